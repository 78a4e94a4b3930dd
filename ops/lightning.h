#pragma once
#include <algorithm>
#include <cmath>

#include "core/rules.h"

namespace heddle {

// How the heads of q, k, v and the states go together. There are as many output heads as query or
// value heads, whichever are more; head o of the output reads head o / (ho / hx) of tensor x.
struct LightningHeads {
  int64_t q, k, v, out, states;
  LightningHeads(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slopes)
      : q(q.shape[2]),
        k(k.shape[2]),
        v(v.shape[2]),
        out(std::max(this->q, this->v)),
        states(slopes.shape[0]) {}
  int64_t of(int64_t heads, int64_t head) const { return head / (out / heads); }
  // Heads of the output that share what k has of them
  int64_t group() const { return k ? out / k : 0; }

  void validate() const {
    const bool values_share = q == k && k > 0 && v % k == 0,
               queries_share = k == v && k > 0 && q % k == 0;
    HEDDLE_CHECK(values_share || queries_share || out == 0, kShape, "k",
                 "hq and hk must be equal with hv a multiple of them, or hk and hv equal with hq a "
                 "multiple of them, got "
                 "hq = ",
                 q, ", hk = ", k, ", hv = ", v);
    const bool either = queries_share && k != out;
    HEDDLE_CHECK(states == out || (queries_share && states == k), kShape, "slopes",
                 "slopes must have one entry per state, ", out, either ? " or " : "",
                 either ? Part(k) : Part(""), ", got ", states);
  }
};

// Causal linear attention with one constant decay per head, lambda = exp(-slope):
//   S_t = lambda S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t
struct Lightning {
  static constexpr const char* kName = "lightning";
  Tensor q;              // [b, s, hq, d]
  Tensor k;              // [b, s, hk, d]
  Tensor v;              // [b, s, hv, e]
  Tensor slopes;         // [hs] f32, natural-log decay per token, >= 0
  Tensor cu_seqlens;     // [n + 1] i32: where each packed sequence begins, b = 1
  Tensor initial_state;  // [b, hs, d, e] f32, or [n, hs, d, e] with cu_seqlens
  Tensor out;            // [b, s, max(hq, hv), e]
  Tensor state;          // as initial_state, after the last token
  double scale = 1;
  int64_t chunk_size = 64;  // tokens whose pairs are computed directly; changes rounding only
  int precision = 0;        // 1: nothing between inputs and outputs has fewer digits than f32
  int schedule = 0;         // way through a sequence: 0 the faster one, 1 one pass, 2 segments
  bool output_final_state = false;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &Lightning::q, "b s hq d", kFloats);
    schema.input("k", &Lightning::k, "b s hk d", like("q"));
    schema.input("v", &Lightning::v, "b s hv e", like("q"));
    schema.input("slopes", &Lightning::slopes, "hs", kF32);
    schema.optional("cu_seqlens", &Lightning::cu_seqlens, "n+1", kI32);
    schema.optional("initial_state", &Lightning::initial_state, "b hs d e", kF32)
        .when("cu_seqlens", "n hs d e");
    schema.number("scale", &Lightning::scale, 1);
    schema.integer("chunk_size", &Lightning::chunk_size, 64).at_least(16).at_most(256);
    schema.choice("precision", &Lightning::precision, {"default", "high"});
    schema.choice("schedule", &Lightning::schedule, {"auto", "fused", "two-pass"});
    schema.flag("output_final_state", &Lightning::output_final_state);
    schema.output("out", &Lightning::out, "b s hq|hv e", like("q"));
    schema.output("state", &Lightning::state, "b hs d e", kF32)
        .when("cu_seqlens", "n hs d e")
        .only_if("output_final_state");
  }

  void validate() const { validate_scan(*this); }

  // What the scan and its backward ask for
  template <class Op> static void validate_scan(const Op& op) {
    LightningHeads(op.q, op.k, op.v, op.slopes).validate();
    const int64_t d = op.q.shape[3], e = op.v.shape[3];
    HEDDLE_CHECK(d >= 1 && d <= 256, kShape, "q", "d must be from 1 to 256, got ", d);
    HEDDLE_CHECK(e >= 1 && e <= 256, kShape, "v", "e must be from 1 to 256, got ", e);
    HEDDLE_CHECK((op.chunk_size & (op.chunk_size - 1)) == 0, kArgument, "chunkSize",
                 "chunkSize must be a power of two, got ", op.chunk_size);
    HEDDLE_CHECK(!op.cu_seqlens || op.q.shape[0] == 1, kShape, "q",
                 "b must be 1 with cuSeqlens, got ", op.q.shape[0]);
  }
};

// The gradients of a scan. With R_n = dstate, or 0, and G_t what S_t adds to the loss:
//   G_t = R_t + scale q_t^T dout_t,  R_{t-1} = lambda G_t,  dinitial_state = R_0
//   dq_t = scale dout_t S_t^T,  dk_t = v_t G_t^T,  dv_t = k_t G_t
struct LightningBackward {
  static constexpr const char* kName = "lightning.backward";
  Tensor q, k, v, slopes, cu_seqlens, initial_state;  // as for the scan
  Tensor dout;                                        // [b, s, max(hq, hv), e]
  Tensor dstate;                                      // as initial_state
  Tensor dq, dk, dv;                                  // as q, k, v
  Tensor dinitial_state;                              // as initial_state
  Tensor dslopes;                                     // [hs] f32
  double scale = 1;
  int64_t chunk_size = 64;
  int precision = 0;
  bool output_dinitial_state = false, output_dslopes = false;

  template <class Schema> static void describe(Schema& schema) {
    using Op = LightningBackward;
    schema.input("q", &Op::q, "b s hq d", kFloats);
    schema.input("k", &Op::k, "b s hk d", like("q"));
    schema.input("v", &Op::v, "b s hv e", like("q"));
    schema.input("dout", &Op::dout, "b s ho e", like("q"));
    schema.input("slopes", &Op::slopes, "hs", kF32);
    schema.optional("cu_seqlens", &Op::cu_seqlens, "n+1", kI32);
    schema.optional("initial_state", &Op::initial_state, "b hs d e", kF32)
        .when("cu_seqlens", "n hs d e");
    schema.optional("dstate", &Op::dstate, "b hs d e", kF32).when("cu_seqlens", "n hs d e");
    schema.number("scale", &Op::scale, 1);
    schema.integer("chunk_size", &Op::chunk_size, 64).at_least(16).at_most(256);
    schema.choice("precision", &Op::precision, {"default", "high"});
    schema.flag("output_dinitial_state", &Op::output_dinitial_state);
    schema.flag("output_dslopes", &Op::output_dslopes);
    schema.output("dq", &Op::dq, "b s hq d", like("q"));
    schema.output("dk", &Op::dk, "b s hk d", like("q"));
    schema.output("dv", &Op::dv, "b s hv e", like("q"));
    schema.output("dinitial_state", &Op::dinitial_state, "b hs d e", kF32)
        .when("cu_seqlens", "n hs d e")
        .only_if("output_dinitial_state");
    schema.output("dslopes", &Op::dslopes, "hs", kF32).only_if("output_dslopes");
  }

  void validate() const {
    Lightning::validate_scan(*this);
    const int64_t heads = LightningHeads(q, k, v, slopes).out;
    HEDDLE_CHECK(dout.shape[2] == heads, kShape, "dout",
                 "dout must have as many heads as the output, ", heads, ", got ", dout.shape[2]);
  }
};

// A few tokens per sequence on a pool of states, each row of the batch with a slot of its own
struct LightningDecode {
  static constexpr const char* kName = "lightning.decode";
  Tensor q;       // [b, s, hq, d]
  Tensor k;       // [b, s, hk, d]
  Tensor v;       // [b, s, hv, e]
  Tensor slopes;  // [hs] f32
  Tensor states;  // [pool, hs, d, e] f32, or [pool, hs, e, d] by state_layout; updated in place
  Tensor slots;  // [b] i32: the state that a row uses, each at most once; negative rows are skipped
                 // and give 0
  Tensor out;    // [b, s, max(hq, hv), e]
  Tensor all_states;  // [b, s, hs, d, e] f32 in the same layout: the state after each token
  double scale = 1;
  int state_layout = 0;  // 0: rows of d, e contiguous; 1: rows of e, d contiguous
  bool output_all_states = false;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &LightningDecode::q, "b s hq d", kFloats);
    schema.input("k", &LightningDecode::k, "b s hk d", like("q"));
    schema.input("v", &LightningDecode::v, "b s hv e", like("q"));
    schema.input("slopes", &LightningDecode::slopes, "hs", kF32);
    schema.inout("states", &LightningDecode::states, "pool hs rows columns", kF32);
    schema.input("slots", &LightningDecode::slots, "b", kI32);
    schema.number("scale", &LightningDecode::scale, 1);
    schema.choice("state_layout", &LightningDecode::state_layout, {"dk-ev", "ev-dk"});
    schema.flag("output_all_states", &LightningDecode::output_all_states);
    schema.output("out", &LightningDecode::out, "b s hq|hv e", like("q"));
    schema.output("all_states", &LightningDecode::all_states, "b s hs rows columns", kF32)
        .only_if("output_all_states");
  }

  void validate() const {
    LightningHeads(q, k, v, slopes).validate();
    const int64_t d = q.shape[3], e = v.shape[3];
    HEDDLE_CHECK(d >= 1 && d <= 256 && e >= 1 && e <= 256, kShape, "q",
                 "d and e must be from 1 to 256, got ", d, " and ", e);
    HEDDLE_CHECK(q.shape[1] <= 16, kShape, "q", "s must be at most 16, got ", q.shape[1],
                 "; longer runs belong to lightning");
    const int64_t rows = state_layout ? e : d, columns = state_layout ? d : e;
    HEDDLE_CHECK(states.shape[2] == rows && states.shape[3] == columns, kShape, "states",
                 "states must be [pool, hs, ", rows, ", ", columns, "], got ", states);
    HEDDLE_CHECK(states.contiguous(), kShape, "states",
                 "states must be contiguous; call contiguous() first");
  }
};

}  // namespace heddle
