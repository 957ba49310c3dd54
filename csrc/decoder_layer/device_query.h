// What a query of a step sees.
#pragma once
#include "core/cuda/ptx.h"
#include "decoder_layer/device.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

// The rows of a step, and how its queries lie.
struct RowView {
  const int64_t* rows;
  int64_t window;
  int M, heads, kv_heads;
};

inline RowView view_of(const AttendProblem& p) {
  return {p.rows, p.window, static_cast<int>(p.M), static_cast<int>(p.heads),
          static_cast<int>(p.cache.kv_heads)};
}

struct Query {
  uint64_t tree;
  int row, place;          // place: of the head in [M, heads]; row < 0: there is no such query
  int start, prefix, end;  // sees slots [start, prefix) and those of the tree, all below `end`
  int is_private;
};

SALTIRE_DEVICE Query no_query() {
  return {0, -1, 0, 0, 0, 0, 0};
}

SALTIRE_DEVICE int highest_bit(uint64_t bits) {
  int place = 0;
  for (int step = 32; step > 0; step /= 2) {
    if (bits >> step != 0) {
      bits >>= step;
      place += step;
    }
  }
  return place;
}

// Head h of the group that reads head g of keys, of row m.
SALTIRE_DEVICE Query query_of_row(const RowView& view, int m, int g, int h) {
  const int64_t* const row = view.rows + int64_t{m} * kRowColumns;
  const int64_t prefix = row[kPrefix], first = row[kPosition] + 1 - view.window;
  Query q = no_query();
  q.row = m;
  q.place = m * view.heads + g * (view.heads / view.kv_heads) + h;
  q.tree = static_cast<uint64_t>(row[kTree]);
  q.prefix = static_cast<int>(prefix);
  if (view.window > 0 && first > 0) q.start = static_cast<int>(first < prefix ? first : prefix);
  q.end = q.tree == 0 ? q.prefix : q.prefix + highest_bit(q.tree) + 1;
  q.is_private = row[kSlot] < 0 ? 1 : 0;
  return q;
}

// Of a prompt: queries of a head of keys, row after row.
SALTIRE_DEVICE Query query_of_prompt(const RowView& view, int g, int flat) {
  const int group = view.heads / view.kv_heads;
  if (flat >= view.M * group) return no_query();
  return query_of_row(view, flat / group, g, flat % group);
}

SALTIRE_DEVICE bool sees(const Query& q, int slot) {
  if (slot < q.prefix) return slot >= q.start;
  const int bit = slot - q.prefix;
  return bit < 64 && (q.tree >> bit & 1) != 0;
}

}  // namespace
}  // namespace saltire::decoder_layer
