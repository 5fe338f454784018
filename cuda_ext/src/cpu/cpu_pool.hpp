// A persistent pool of threads for the CPU kernels, started by the first call that pays for it.
#pragma once

#include <cstdint>

namespace gearfall::cpu {

// How a task's pieces lie with its threads: each begins with a run of its own, the same one in
// every task of as many pieces, so that what it wrote in one is near in the next; then it helps
// others.
struct PieceRuns {
    std::int64_t pieces;
    std::int64_t runs;

    std::int64_t begin(std::int64_t run) const { return pieces * run / runs; }
    std::int64_t of(std::int64_t piece) const { return ((piece + 1) * runs - 1) / pieces; }
    bool ends_with(std::int64_t piece) const { return piece + 1 == begin(of(piece) + 1); }
};

// Runs one numbered piece of a task; pieces write to disjoint memory and do not throw.
using Piece = void (*)(const void *task, std::int64_t piece);

// Runs pieces 0..pieces-1 on the caller and at most threads-1 pool threads; returns when all are
// done. Whoever finds the pool busy runs its pieces alone. A forked child starts a pool of its own.
void run_pieces(std::int64_t pieces, int threads, Piece run, const void *task);

template <class Function>
void parallel_for(std::int64_t pieces, int threads, const Function &function) {
    run_pieces(
        pieces, threads,
        [](const void *task, std::int64_t piece) {
            (*static_cast<const Function *>(task))(piece);
        },
        &function);
}

}  // namespace gearfall::cpu
