// Pool threads sleep between tasks; one that was just busy spins a little first, because the next
// kernel of the same decode step comes within microseconds.
#include "cpu_pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace gearfall::cpu {

namespace {

constexpr int kSpins = 4000;
constexpr std::int64_t kMostRuns = 64;  // of a task; more threads share them

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Makes what was stored past the caches seen before what is stored after it.
inline void publish() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

// Who may join the open task. One word, so that joining and closing cannot interleave:
// bit 0 open, bits 8..31 seats left for pool threads, bits 32..63 pool threads inside.
class Door {
public:
    void open(int seats) {
        word_.store(kOpen | static_cast<std::uint64_t>(seats) * kSeat, std::memory_order_release);
    }
    bool enter() {
        std::uint64_t word = word_.load(std::memory_order_relaxed);
        while ((word & kOpen) != 0 && (word & kSeats) != 0) {
            if (word_.compare_exchange_weak(word, word - kSeat + kInside,
                                            std::memory_order_acquire,
                                            std::memory_order_relaxed)) {
                return true;
            }
        }
        return false;
    }
    void leave() { word_.fetch_sub(kInside, std::memory_order_release); }
    // Lets nobody else in and waits until all are out: each of them is in its last piece.
    void close() {
        word_.fetch_and(~(kOpen | kSeats), std::memory_order_relaxed);
        for (int spins = 0; word_.load(std::memory_order_acquire) >= kInside; ++spins) {
            if (spins < kSpins) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }

private:
    static constexpr std::uint64_t kOpen = 1;
    static constexpr std::uint64_t kSeat = std::uint64_t{1} << 8;
    static constexpr std::uint64_t kSeats = 0xFFFFFF00;
    static constexpr std::uint64_t kInside = std::uint64_t{1} << 32;
    std::atomic<std::uint64_t> word_{0};
};

// Threads started meanwhile take no signals: those are the program's own to handle.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked &) = delete;
    SignalsBlocked &operator=(const SignalsBlocked &) = delete;

private:
    sigset_t before_;
};

class Pool {
public:
    // False when another thread's task has the pool.
    bool run(std::int64_t pieces, int threads, Piece run, const void *task) {
        const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        const int seats = grow(threads - 1);
        run_ = run;
        task_ = task;
        runs_ = std::min<std::int64_t>(threads, kMostRuns);
        const PieceRuns cut{pieces, runs_};
        for (std::int64_t i = 0; i < runs_; ++i) {
            left_[i].next.store(cut.begin(i), std::memory_order_relaxed);
            left_[i].end = cut.begin(i + 1);
        }
        door_.open(seats);
        announce();
        work(0);
        door_.close();
        return true;
    }

private:
    // What is left of a run; on a cache line of its own.
    struct alignas(64) Left {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;

        bool is_any() const { return next.load(std::memory_order_relaxed) < end; }
    };

    void work(std::int64_t first_run) {
        for (std::int64_t i = 0; i < runs_; ++i) {
            Left &left = left_[(first_run + i) % runs_];
            while (left.is_any()) {
                const std::int64_t piece = left.next.fetch_add(1, std::memory_order_relaxed);
                if (piece < left.end) run_(task_, piece);
            }
        }
        publish();
    }

    // Returns how many pool threads may help: fewer than asked for where the system gives no more.
    int grow(int wanted) {
        if (size_ >= wanted) return wanted;
        const SignalsBlocked blocked;
        try {
            for (; size_ < wanted; ++size_) {
                std::thread([this, run = size_ + 1] { serve(run); }).detach();
            }
        } catch (const std::system_error &) {
        }
        return std::min(size_, wanted);
    }

    void announce() {
        bool is_anybody_asleep = false;
        {
            const std::lock_guard<std::mutex> held(sleep_);
            generation_.fetch_add(1, std::memory_order_release);
            is_anybody_asleep = sleepers_ > 0;
        }
        if (is_anybody_asleep) wake_.notify_all();
    }

    void serve(std::int64_t run) {
        std::uint64_t seen = 0;
        for (;;) {
            seen = wait_past(seen);
            if (door_.enter()) {
                work(run);
                door_.leave();
            }
        }
    }

    std::uint64_t wait_past(std::uint64_t seen) {
        for (int spins = 0; spins < kSpins; ++spins) {
            const std::uint64_t now = generation_.load(std::memory_order_acquire);
            if (now != seen) return now;
            relax();
        }
        std::unique_lock<std::mutex> held(sleep_);
        ++sleepers_;
        wake_.wait(held, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        --sleepers_;
        return generation_.load(std::memory_order_relaxed);
    }

    std::mutex owner_;  // held by the caller whose task runs; guards the fields down to left_
    int size_ = 0;
    Piece run_ = nullptr;
    const void *task_ = nullptr;
    std::int64_t runs_ = 0;
    std::array<Left, kMostRuns> left_;
    Door door_;

    std::mutex sleep_;
    std::condition_variable wake_;
    int sleepers_ = 0;
    std::atomic<std::uint64_t> generation_{0};
};

// Never freed: its threads wait in it until the process ends.
std::atomic<Pool *> current_pool{nullptr};

// A forked child has none of the threads and perhaps a locked mutex: it leaves the copy alone.
void forget_pool() { current_pool.store(nullptr, std::memory_order_relaxed); }

Pool &pool() {
    Pool *found = current_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    static std::atomic<bool> is_registered{false};
    if (!is_registered.exchange(true)) pthread_atfork(nullptr, nullptr, forget_pool);
    auto fresh = std::make_unique<Pool>();
    if (current_pool.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) {
        return *fresh.release();
    }
    return *found;
}

}  // namespace

void run_pieces(std::int64_t pieces, int threads, Piece run, const void *task) {
    const int useful = static_cast<int>(std::min<std::int64_t>(threads, pieces));
    if (useful > 1 && pool().run(pieces, useful, run, task)) return;
    for (std::int64_t piece = 0; piece < pieces; ++piece) run(task, piece);
    publish();
}

}  // namespace gearfall::cpu
