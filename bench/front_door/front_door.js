// One closed-loop load on an OpenAI-compatible chat endpoint; k6 runs it, bench.load reads its last line.
// Every answer is read to its end and checked: a wrong one counts as a failure.
import http from "k6/http";
import { check } from "k6";

const url = __ENV.URL;
const expected = __ENV.EXPECTED;
const isStream = __ENV.STREAM === "1";
const body = JSON.stringify({
  model: __ENV.MODEL,
  messages: [{ role: "user", content: __ENV.QUESTION }],
  max_tokens: Number(__ENV.TOKENS),
  temperature: 0,
  stream: isStream,
});
const params = {
  headers: { "Content-Type": "application/json", Authorization: `Bearer ${__ENV.API_KEY}` },
};

export const options = {
  vus: Number(__ENV.USERS),
  duration: `${__ENV.SECONDS}s`,
  summaryTrendStats: ["med", "p(95)", "p(99)", "max"],
};

function answerOf(reply) {
  if (reply.status !== 200) return null;
  if (!isStream) return reply.json("choices.0.message.content");
  if (!reply.body.includes("data: [DONE]")) return null;
  return [...reply.body.matchAll(/"content":\s*"([^"]*)"/g)].map((match) => match[1]).join("");
}

export default function () {
  const reply = http.post(url, body, params);
  check(reply, { answered: (it) => answerOf(it) === expected });
}

export function handleSummary(data) {
  const latency = data.metrics.http_req_duration.values;
  const checks = data.metrics.checks.values;
  const figures = {
    requests: checks.passes + checks.fails,
    failures: checks.fails,
    duration_s: data.state.testRunDurationMs / 1000,
    p50_ms: latency.med,
    p95_ms: latency["p(95)"],
    p99_ms: latency["p(99)"],
    max_ms: latency.max,
  };
  return { stdout: JSON.stringify(figures) + "\n" };
}
