// Greedy drafting: steps of one token a sequence, each fed the best token of the step before,
// inside one team and without a return to Python in between.
#pragma once
#include <algorithm>
#include <vector>

#include "decoder_layer/step.h"

namespace saltire::decoder_layer {

// Confidences (the draft's own probability of its token) are told apart in so many equal bins.
constexpr int64_t kConfidenceBins = 16;

// Where a sequence stands, as it comes from Python: int64 [B, 4].
struct DraftStart {
  int64_t token;  // not yet in the cache
  int64_t sequence;
  int64_t slot;  // its slot and position
  int64_t most;  // drafts wanted
};
static_assert(sizeof(DraftStart) == 4 * sizeof(int64_t), "read straight from the tensor");

struct DraftArguments {
  int64_t sequences = 0;
  const DraftStart* start = nullptr;
  int64_t longest = 0;              // width of tokens and shares
  const float* survival = nullptr;  // [kConfidenceBins] chance that a draft of such a share stands
  float confidence = 0.0f;          // a draft of a lower share is the last
  float worth = 0.0f;               // so is one that stands, with all before it, less likely
  int64_t* tokens = nullptr;        // [B, longest]
  float* shares = nullptr;          // [B, longest]
  int64_t* counts = nullptr;        // [B]
};

inline int64_t confidence_bin(float share) {
  const auto bin = static_cast<int64_t>(share * static_cast<float>(kConfidenceBins));
  return std::min(std::max(bin, int64_t{0}), kConfidenceBins - 1);
}

// `step` gives what all steps share: rotation, units, head_outputs.
inline void draft(const Model& model, const Cache& cache, const Kernels& kernels,
                  StepArguments step, const DraftArguments& args, Workspace& work, Team& team) {
  const int64_t B = args.sequences;
  std::vector<int64_t> alive, wanted(static_cast<size_t>(B)), best(static_cast<size_t>(B));
  std::vector<float> share(static_cast<size_t>(B)), stands(static_cast<size_t>(B), 1.0f);
  std::vector<Row> rows(static_cast<size_t>(B));
  for (int64_t b = 0; b < B; ++b) {
    wanted[static_cast<size_t>(b)] = b;
    args.counts[b] = 0;
    if (args.start[b].most > 0) alive.push_back(b);
  }
  step.row = rows.data();
  step.wanted = wanted.data();
  step.best = best.data();
  step.best_share = share.data();
  while (!alive.empty()) {
    step.rows = step.wanted_rows = static_cast<int64_t>(alive.size());
    for (size_t i = 0; i < alive.size(); ++i) {
      const DraftStart& start = args.start[alive[i]];
      const int64_t done = args.counts[alive[i]], slot = start.slot + done;
      const int64_t token =
          done == 0 ? start.token : args.tokens[alive[i] * args.longest + done - 1];
      rows[i] = {token, start.sequence, slot, slot, slot + 1, 0};
    }
    Step(model, cache, kernels, step, work, team).run();
    size_t kept = 0;
    for (size_t i = 0; i < alive.size(); ++i) {
      const int64_t b = alive[i];
      const int64_t at = b * args.longest + args.counts[b]++;
      args.tokens[at] = best[i];
      args.shares[at] = share[i];
      float& chance = stands[static_cast<size_t>(b)];
      chance *= args.survival[confidence_bin(share[i])];
      const bool more = args.counts[b] < args.start[b].most && share[i] >= args.confidence &&
                        chance >= args.worth;
      if (more) alive[kept++] = b;
    }
    alive.resize(kept);
  }
}

}  // namespace saltire::decoder_layer
