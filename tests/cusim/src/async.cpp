// cp.async, mbarrier, bulk and tensor (TMA) copies, tensormap.
#include "sim.h"
#include <algorithm>

namespace cusim {
namespace {
inline void putp(Warp& w, u32 ref, u32 v) { u32& p = P(w, ref); p = (p & ~w.m) | (v & w.m); }
inline u64 lane_val(Warp& w, u32 ref, u32 size, u32 l) { u64 v = 0; memcpy(&v, R<char>(w, ref) + l * size, std::min(size, 8u)); return v; }
inline u32 mode(Warp& w) { return (u32)w.L->cfg.async_mode; }

// ---------------- mbarrier ----------------
MBar& mbar(Warp& w, u64 addr, Cta** owner = nullptr, bool init = false) {
  Cta* c; smem_ptr(w, addr, 8, &c); u32 off = (u32)addr & 0xffffff;
  if ((w.checks & K_ALIGN) && (off & 7)) sim_error(w, "misaligned", fmt("mbarrier address 0x%x is not 8-byte aligned", off));
  MBar& b = c->mbars[off]; if (!init && !b.valid) sim_error(w, "mbarrier", fmt("mbarrier operation on offset %d, which holds no initialised mbarrier", (int)off - (int)SMEM_BASE));
  if (sh_checked(w)) { if (init) sh_write(w, c, off, 8, A_GEN, 0); else sh_read(w, c, off, 8, A_GEN, 0, true); }
  if (owner) *owner = c;
  return b;
}
void complete_if(Group& g, MBar& b) {
  if (b.pending != 0 || b.tx != 0) return;
  b.phase++; b.pending = b.count; if (!b.acc.v.empty()) { b.done.join(b.acc); std::fill(b.acc.v.begin(), b.acc.v.end(), 0); std::fill(b.acc.a.begin(), b.acc.a.end(), 0); }
  g.progress++;
}
void release_into(Warp& w, MBar& b) { if (!(w.checks & K_RACE)) return; if (b.acc.v.empty()) { zero_clocks(*w.grp, b.acc); zero_clocks(*w.grp, b.done); } b.acc.join(w.vc); }
void arrive(Warp& w, MBar& b, u32 n) {
  if (b.pending < (i64)n) sim_error(w, "mbarrier", fmt("%u arrival(s) on an mbarrier with %lld pending (count %u): more arrivals than expected in this phase", n, (long long)b.pending, b.count));
  b.pending -= n; w.grp->progress++; complete_if(*w.grp, b);
}
// x: 0 init 1 inval 2 expect_tx 3 complete_tx 4 arrive 5 arrive.expect_tx 6 arrive_drop 7 arrive_drop.expect_tx
void h_mbar(Warp& w, const Inst& i) {
  bool rel = false;
  EACH(l, w.m) {
    u64 ad = lane_val(w, i.a, i.as, l) + (u64)i.imm; Cta* c; MBar& b = mbar(w, ad, &c, i.x == 0); u32 n = i.b != NOREF ? R<u32>(w, i.b)[l] : 1;
    switch (i.x) {
      case 0: { if (n == 0 || n > 0xfffff) sim_error(w, "mbarrier", fmt("mbarrier.init with count %u", n)); b = MBar(); b.valid = true; b.off = (u32)ad & 0xffffff; b.count = n; b.pending = n; memset(c->smem + b.off, 0, 8); break; }
      case 1: b.valid = false; break;
      case 2: b.tx += n; break;
      case 3: b.tx -= n; complete_if(*w.grp, b); break;
      default: {
        if (i.d != NOREF) { u64 tok = b.phase; memcpy(R<u64>(w, i.d) + l, &tok, 8); }
        release_into(w, b); rel = true;
        if (i.x >= 6) b.count--;
        if (i.x == 5 || i.x == 7) { b.tx += n; arrive(w, b, 1); } else arrive(w, b, n);
      }
    }
    w.grp->progress++;
  }
  if (rel) release_tick(w);
}
// x: bit0 parity, bit1 try
void h_mbar_wait(Warp& w, const Inst& i) {
  u32 r = 0; bool failed = false;
  EACH(l, w.m) {
    MBar& b = mbar(w, lane_val(w, i.a, i.as, l) + (u64)i.imm); bool done;
    if (i.x & 1) done = (b.phase & 1) != (R<u32>(w, i.b)[l] & 1); else done = b.phase != R<u64>(w, i.b)[l];
    if (done) { r |= 1u << l; if ((w.checks & K_RACE) && !b.done.v.empty()) w.vc.join(b.done); } else failed = true;
  }
  putp(w, i.d, r); if (failed) stall(w);
}
void h_mbar_pending(Warp& w, const Inst& i) { lanes<u32>(w, i.d, [](int) { return 0u; }); }

// ---------------- cp.async ----------------
// a: dst (as), b: src 64-bit (imm2 in ext->w[0]), c: src-size or NOREF, e: ignore-src predicate or NOREF
void h_cpasync(Warp& w, const Inst& i) {
  AsyncOp o; o.in = &i; o.kind = 0; o.mask = w.m; o.size = i.sz; o.group = w.cp_group; o.clock = async_tick(w, A_CPASYNC);
  i64 soff = (i64)i.ext->w[0]; bool chk = sh_checked(w); u32 a32[32]; u32 ign = i.e != NOREF ? P(w, i.e) : 0; if (i.ftz) ign = ~ign;
  EACH(l, w.m) {
    u64 d = lane_val(w, i.a, i.as, l) + (u64)i.imm; u64 s = lane_val(w, i.b, i.ds, l) + (u64)soff; u32 ss = i.c != NOREF ? R<u32>(w, i.c)[l] : i.sz; if (i.e != NOREF && (ign >> l & 1)) ss = 0;
    if (ss > i.sz) sim_error(w, "cp.async", fmt("cp.async source size %u is larger than the copy size %u", ss, i.sz));
    Cta* c; smem_ptr(w, d, i.sz, &c);
    if ((w.checks & K_ALIGN) && ((d | s) & (i.sz - 1u))) sim_error(w, "misaligned", fmt("cp.async of %u bytes: shared 0x%x or global 0x%llx is misaligned (lane %u)", i.sz, (u32)d, (unsigned long long)s, l));
    if (ss) check_global(w, s, ss, false, (int)l);
    if (chk) sh_write(w, c, (u32)d & 0xffffff, i.sz, A_CPASYNC, o.clock);
    o.dst[l] = (u32)d; o.src[l] = s; o.ssize[l] = (u8)ss; a32[l] = (u32)d;
    if (w.counters) w.stats->cpasync_bytes += ss;
  }
  if (w.counters) smem_wavefronts(w, a32, w.m, i.sz, 1);
  u32 md = mode(w); if (md == 1 || (md == 2 && (w.grp->rnd() & 1))) { cp_perform(w, o); o.mask = 0; }
  w.cpq.push_back(o);
}
void h_cp_commit(Warp& w, const Inst&) { w.cp_group++; }
void h_cp_wait(Warp& w, const Inst& i) {
  if (i.x) { w.cp_group++; cp_flush(w, w.cp_group); }                        // wait_all
  else { u32 n = (u32)i.imm; cp_flush(w, w.cp_group > n ? w.cp_group - n : 0); }
  progress(w);
}
void h_cp_mbar(Warp& w, const Inst& i) {      // x: noinc
  AsyncOp o; o.in = &i; o.kind = 1; o.mask = w.m; o.size = 0; o.group = w.cp_group; o.clock = w.clk[A_CPASYNC];
  EACH(l, w.m) { u64 ad = lane_val(w, i.a, i.as, l) + (u64)i.imm; MBar& b = mbar(w, ad); if (!i.x) b.pending++; o.mbar[l] = ad; }
  w.cpq.push_back(o);
  if (mode(w) == 1) { for (auto& q : w.cpq) if (q.mask) { cp_perform(w, q); q.mask = 0; } }
}

// ---------------- bulk copies ----------------
struct BulkDst { Cta* c; u32 off; };
void tx_done(Group* g, Cta* c, u32 mb, u32 bytes, u32 agent, u32 clk) { mbar_complete_tx(*g, c, mb, bytes, agent, clk, nullptr); }
void submit(Warp& w, std::function<void()> f) {
  u32 md = mode(w); if (md == 1 || (md == 2 && (w.grp->rnd() & 3) == 0)) { f(); progress(w); } else w.grp->pending.push_back({std::move(f)});
}
void submit_store(Warp& w, std::function<void()> f, u32 clk) {
  u32 md = mode(w); BulkOp o; o.group = w.bulk_group; o.clock = clk; if (md == 1 || (md == 2 && (w.grp->rnd() & 1))) { f(); o.done = true; } else o.run = std::move(f); w.bulkq.push_back(std::move(o));
}
enum Red { RD_NONE = 0, RD_ADD, RD_MIN, RD_MAX, RD_INC, RD_DEC, RD_AND, RD_OR, RD_XOR };
// elementwise reduction into memory; elem uses the PTX .elemtype numbering
template <class T, class F> void red_n(char* d, const char* s, size_t n, F f) { for (size_t k = 0; k < n; k++) { T b; memcpy(&b, s + k * sizeof(T), sizeof(T)); T* p = (T*)(d + k * sizeof(T)); T old = __atomic_load_n(p, __ATOMIC_SEQ_CST); T nw; do nw = f(old, b); while (!__atomic_compare_exchange_n(p, &old, nw, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)); } }
void reduce_bytes(char* d, const char* s, size_t bytes, int red, int elem) {
  auto iop = [&](auto a, auto b) { switch (red) { case RD_ADD: return (decltype(a))(a + b); case RD_MIN: return std::min(a, b); case RD_MAX: return std::max(a, b); case RD_AND: return (decltype(a))(a & b); case RD_OR: return (decltype(a))(a | b); default: return (decltype(a))(a ^ b); } };
  auto fop = [&](auto a, auto b) { switch (red) { case RD_ADD: return a + b; case RD_MIN: return a < b ? a : b; default: return a > b ? a : b; } };
  switch (elem) {
    case 2: red_n<u32>(d, s, bytes / 4, [&](u32 a, u32 b) { return iop(a, b); }); break;
    case 3: red_n<u32>(d, s, bytes / 4, [&](u32 a, u32 b) { return (u32)iop((i32)a, (i32)b); }); break;
    case 4: red_n<u64>(d, s, bytes / 8, [&](u64 a, u64 b) { return iop(a, b); }); break;
    case 5: red_n<u64>(d, s, bytes / 8, [&](u64 a, u64 b) { return (u64)iop((i64)a, (i64)b); }); break;
    case 6: red_n<u16>(d, s, bytes / 2, [&](u16 a, u16 b) { return f2h(fop(h2f(a), h2f(b))); }); break;
    case 10: red_n<u16>(d, s, bytes / 2, [&](u16 a, u16 b) { return f2b(fop(b2f(a), b2f(b))); }); break;
    case 9: red_n<u64>(d, s, bytes / 8, [&](u64 a, u64 b) { return bitc<u64>(fop(bitc<double>(a), bitc<double>(b))); }); break;
    default: red_n<u32>(d, s, bytes / 4, [&](u32 a, u32 b) { return bitc<u32>(fop(bitc<float>(a), bitc<float>(b))); });
  }
}
int elem_of(const std::string& t) { if (t == "u32" || t == "b32") return 2; if (t == "s32") return 3; if (t == "u64" || t == "b64") return 4; if (t == "s64") return 5; if (t == "f16") return 6; if (t == "f32") return 7; if (t == "f64") return 9; if (t == "bf16") return 10; return -1; }
int red_of(const Stmt& s) { return s.has("add") ? RD_ADD : s.has("min") ? RD_MIN : s.has("max") ? RD_MAX : s.has("and") ? RD_AND : s.has("or") ? RD_OR : s.has("xor") ? RD_XOR : RD_NONE; }

// x: 0 global->shared, 1 shared->global, 2 shared->shared(cluster) ; y: red | elem<<8 | multicast<<16
// ext->v: dst, src, size, [mbar], [mask] ; ext->w: operand sizes ; ext->targets: immediate offsets
void h_bulk(Warp& w, const Inst& i) {
  EACH(l, w.m) {
    auto val = [&](size_t k) { return lane_val(w, i.ext->v[k], i.ext->w[k], l) + (u64)(i64)i.ext->targets[k]; };
    u64 dst = val(0), src = val(1); u32 size = (u32)lane_val(w, i.ext->v[2], i.ext->w[2], l);
    if (size % 16 || ((dst | src) & 15)) sim_error(w, "misaligned", fmt("cp.async.bulk: size %u and both addresses must be multiples of 16", size));
    if (size == 0) continue;
    w.stats->tma_bytes += size;
    if (i.x == 1) {
      Cta* c; char* s = smem_ptr(w, src, size, &c); u32 clk = async_tick(w, A_BULKST); check_global(w, dst, size, true, (int)l); if (sh_checked(w)) sh_read(w, c, (u32)src & 0xffffff, size, A_BULKST, clk);
      int red = i.y & 255, el = i.y >> 8 & 255; submit_store(w, [=] { if (red) reduce_bytes((char*)dst, s, size, red, el); else memcpy((char*)dst, s, size); }, clk);
      continue;
    }
    u64 mb = val(3); u32 mask = (i.y >> 16 & 1) ? (u32)lane_val(w, i.ext->v[4], i.ext->w[4], l) : 0; u32 clk = async_tick(w, A_TMA), ag = w.agent(A_TMA); Group* g = w.grp; int red = i.y & 255, el = i.y >> 8 & 255;
    const char* s; if (i.x == 0) { check_global(w, src, size, false, (int)l); s = (const char*)src; } else { Cta* sc; s = smem_ptr(w, src, size, &sc); if (sh_checked(w)) sh_read(w, sc, (u32)src & 0xffffff, size, A_TMA, clk); }
    std::vector<std::pair<Cta*, Cta*>> to; Cta *dc, *mc; smem_ptr(w, dst, size, &dc); mbar(w, mb, &mc);
    if (mask) { for (u32 r = 0; r < g->ctas.size(); r++) if (mask >> r & 1) to.push_back({g->ctas[r], g->ctas[r]}); } else to.push_back({dc, mc});
    u32 doff = (u32)dst & 0xffffff, moff = (u32)mb & 0xffffff;
    if (sh_checked(w)) for (auto& t : to) sh_write(w, t.first, doff, size, A_TMA, clk);
    submit(w, [=] { for (auto& t : to) { if (red) reduce_bytes(t.first->smem + doff, s, size, red, el); else memcpy(t.first->smem + doff, s, size); tx_done(g, t.second, moff, size, ag, clk); } });
  }
}
void h_bulk_commit(Warp& w, const Inst&) { w.bulk_group++; }
void h_bulk_wait(Warp& w, const Inst& i) { u32 n = (u32)i.imm; bulk_flush(w, w.bulk_group > n ? w.bulk_group - n : 0); progress(w); }

// ---------------- tensor copies ----------------
struct BoxJob { TMap m; i32 crd[5]; };
inline u32 swz(u32 a, int mode) { return mode == 3 ? a ^ ((a >> 7 & 7) << 4) : mode == 2 ? a ^ ((a >> 7 & 3) << 4) : mode == 1 ? a ^ ((a >> 7 & 1) << 4) : a; }
// visit the box row by row: f(shared offset of the row, global address or 0, elements in bounds before/after)
template <class F> void box_rows(const BoxJob& j, u32 base, F f) {
  const TMap& m = j.m; int rank = m.rank_m1 + 1; u32 es = (u32)tmap_elem_size(m.elem), inner = m.box[0]; u32 n[5] = {1, 1, 1, 1, 1}; for (int k = 0; k < rank; k++) n[k] = m.box[k];
  u32 off = base;
  for (u32 e = 0; e < n[4]; e++) for (u32 d = 0; d < n[3]; d++) for (u32 c = 0; c < n[2]; c++) for (u32 b = 0; b < n[1]; b++) {
    u32 ix[5] = {0, b, c, d, e}; bool in = true; u64 ga = m.addr;
    for (int k = 1; k < rank; k++) { i64 p = (i64)j.crd[k] + (i64)ix[k] * std::max<int>(1, m.estr[k]); if (p < 0 || p >= (i64)m.dim[k]) in = false; ga += (u64)p * m.stride[k - 1]; }
    f(off, in ? ga : 0, es, inner); off += inner * es;
  }
}
void box_load(const BoxJob& j, char* smem, u32 base) {
  i64 x0 = j.crd[0]; int st = std::max<int>(1, j.m.estr[0]); i64 dim0 = j.m.dim[0]; int sw = j.m.swizzle;
  box_rows(j, base, [&](u32 off, u64 ga, u32 es, u32 inner) {
    for (u32 q = 0; q < inner * es; q += 16) {           // chunk by chunk: the swizzle moves 16-byte units
      char t[16]; u32 len = std::min(16u, inner * es - q);
      for (u32 k = 0; k < len; k += es) { i64 x = x0 + (i64)((q + k) / es) * st; if (ga && x >= 0 && x < dim0) memcpy(t + k, (char*)(ga + (u64)x * es), es); else memset(t + k, 0, es); }
      memcpy(smem + swz(off + q, sw), t, len);
    }
  });
}
void box_store(const BoxJob& j, const char* smem, u32 base, int red) {
  i64 x0 = j.crd[0]; i64 dim0 = j.m.dim[0]; int sw = j.m.swizzle;
  box_rows(j, base, [&](u32 off, u64 ga, u32 es, u32 inner) {
    if (!ga) return;
    for (u32 k = 0; k < inner; k++) { i64 x = x0 + k; if (x < 0 || x >= dim0) continue; const char* s = smem + swz(off + k * es, sw); char* d = (char*)(ga + (u64)x * es); if (red) reduce_bytes(d, s, es, red, j.m.elem); else memcpy(d, s, es); }
  });
}
void check_box(Warp& w, const BoxJob& j, bool wr) {      // the in-bounds part of the box must lie in an allocation
  const TMap& m = j.m; int rank = m.rank_m1 + 1; u64 lo = m.addr, hi = m.addr; u32 es = (u32)tmap_elem_size(m.elem);
  if (!m.addr || rank > 5 || es == 0) sim_error(w, "tma", "the tensor map is not initialised");
  for (int k = 0; k < rank; k++) { u64 st = k ? m.stride[k - 1] : es; i64 a = std::max<i64>(0, j.crd[k]), b = std::min<i64>(m.dim[k], (i64)j.crd[k] + m.box[k]); if (b <= a) return; lo += (u64)a * st; hi += (u64)(b - 1) * st; }
  check_global(w, lo, es, wr, first_lane(w.m)); if (hi != lo) check_global(w, hi, es, wr, first_lane(w.m));
}
u32 box_bytes(const TMap& m) { u32 b = (u32)tmap_elem_size(m.elem); for (int k = 0; k <= m.rank_m1; k++) b *= m.box[k]; return b; }
// x: 0 load, 1 store, 2 prefetch ; y: red | multicast<<16 ; n: rank ; ext->v: shared addr, map, [mbar], [mask], coords...
void h_tensor(Warp& w, const Inst& i) {
  EACH(l, w.m) {
    auto val = [&](size_t k) { return lane_val(w, i.ext->v[k], i.ext->w[k], l) + (u64)(i64)i.ext->targets[k]; };
    u64 mp = val(1); const char* mpp = gen_ptr(w, (int)l, mp, 128, false); BoxJob j; memcpy(&j.m, mpp, sizeof(TMap));
    if ((u32)j.m.rank_m1 + 1 != i.n) sim_error(w, "tma", fmt("the instruction is %dd but the tensor map has rank %d", i.n, j.m.rank_m1 + 1));
    for (u32 k = 0; k < 5; k++) j.crd[k] = k < i.n ? (i32)lane_val(w, i.ext->v[4 + k], i.ext->w[4 + k], l) : 0;
    if (i.x == 2) continue;
    if (j.m.interleave) sim_error(w, "tma", "interleaved tensor maps are not supported");
    check_box(w, j, i.x == 1); u32 bytes = box_bytes(j.m); u64 sa = val(0); Cta* c; smem_ptr(w, sa, bytes, &c); u32 off = (u32)sa & 0xffffff;
    u32 al = j.m.swizzle ? 128 : 128; if (i.x == 1 && !j.m.swizzle) al = 16; if ((w.checks & K_ALIGN) && off % al) sim_error(w, "misaligned", fmt("tensor copy: shared address 0x%x is not %u-byte aligned", off, al));
    if (j.m.swizzle && (u32)j.m.box[0] * (u32)tmap_elem_size(j.m.elem) > 16u << j.m.swizzle) sim_error(w, "tma", fmt("inner box of %u bytes is wider than the swizzle", (u32)j.m.box[0] * (u32)tmap_elem_size(j.m.elem)));
    w.stats->tma_bytes += bytes;
    if (i.x == 1) {
      u32 clk = async_tick(w, A_BULKST); if (sh_checked(w)) sh_read(w, c, off, bytes, A_BULKST, clk); int red = i.y & 255; char* sm = c->smem;
      submit_store(w, [=] { box_store(j, sm, off, red); }, clk); continue;
    }
    u64 mb = val(2); Cta* mc; mbar(w, mb, &mc); u32 moff = (u32)mb & 0xffffff, clk = async_tick(w, A_TMA), ag = w.agent(A_TMA); Group* g = w.grp; u32 mask = (i.y >> 16 & 1) ? (u32)lane_val(w, i.ext->v[3], i.ext->w[3], l) : 0;
    std::vector<std::pair<Cta*, Cta*>> to; if (mask) { for (u32 r = 0; r < g->ctas.size(); r++) if (mask >> r & 1) to.push_back({g->ctas[r], g->ctas[r]}); } else to.push_back({c, mc});
    if (sh_checked(w)) for (auto& t : to) sh_write(w, t.first, off, bytes, A_TMA, clk);
    submit(w, [=] { for (auto& t : to) { box_load(j, t.first->smem, off); tx_done(g, t.second, moff, bytes, ag, clk); } });
  }
}
// x: field ; y: ordinal ; a: address, b: value
enum Field { FD_ADDR, FD_RANK, FD_BOX, FD_DIM, FD_STRIDE, FD_ESTRIDE, FD_ELEM, FD_INTER, FD_SWZ, FD_FILL };
void h_tmreplace(Warp& w, const Inst& i) {
  EACH(l, w.m) {
    TMap* m = (TMap*)gen_ptr(w, (int)l, (i.e ? TAG_SHARED : 0) | ((i.e ? 0xffffffffull : ~0ull) & (lane_val(w, i.a, i.as, l) + (u64)i.imm)), 128, true); u64 v = lane_val(w, i.b, i.ds, l); u32 o = i.y;
    if (i.e && sh_checked(w)) { u32 a = (u32)lane_val(w, i.a, i.as, l) + (u32)i.imm; sh_write(w, w.grp->ctas[a >> RANK_SHIFT], a & 0xffffff, 128, A_GEN, 0); }
    switch (i.x) { case FD_ADDR: m->addr = v; break; case FD_RANK: m->rank_m1 = (u8)v; break; case FD_BOX: m->box[o] = (u16)v; break; case FD_DIM: m->dim[o] = (u32)v; break; case FD_STRIDE: m->stride[o] = v; break; case FD_ESTRIDE: m->estr[o] = (u8)v; break; case FD_ELEM: m->elem = (u8)v; break; case FD_INTER: m->interleave = (u8)v; break; case FD_SWZ: m->swizzle = (u8)v; break; case FD_FILL: m->fill = (u8)v; break; }
  }
}
void h_tmcopy(Warp& w, const Inst& i) {
  if (!need_converged(w, i, FULL)) return;
  u32 l = (u32)first_lane(w.m); char* d = gen_ptr(w, (int)l, lane_val(w, i.a, i.as, l), 128, true); char* s = smem_ptr(w, lane_val(w, i.b, i.ds, l), 128); memcpy(d, s, 128);
}
void h_nop(Warp&, const Inst&) {}
}  // namespace

int tmap_elem_size(int e) { static const int s[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4}; return e >= 0 && e < 13 ? s[e] : 0; }

void mbar_complete_tx(Group& g, Cta* c, u32 off, u32 bytes, u32 agent, u32 clk, Warp*) {
  auto it = c->mbars.find(off); if (it == c->mbars.end() || !it->second.valid) throw Error("mbarrier", fmt("an asynchronous copy completed on shared offset %d, which holds no initialised mbarrier", (int)off - (int)SMEM_BASE));
  MBar& b = it->second; b.tx -= bytes;
  if (g.L->cfg.checks & K_RACE) { if (b.acc.v.empty()) { zero_clocks(g, b.acc); zero_clocks(g, b.done); } b.acc.v[agent] = std::max(b.acc.v[agent], clk); b.acc.a[agent] = std::max(b.acc.a[agent], clk); }
  complete_if(g, b); g.progress++;
}
void cp_perform(Warp& w, AsyncOp& o) {
  if (o.kind == 1) {
    EACH(l, o.mask) { Cta* c; smem_ptr(w, o.mbar[l], 8, &c); MBar& b = c->mbars[(u32)o.mbar[l] & 0xffffff]; if (w.checks & K_RACE) { if (b.acc.v.empty()) { zero_clocks(*w.grp, b.acc); zero_clocks(*w.grp, b.done); } u32 ag = w.agent(A_CPASYNC); b.acc.v[ag] = std::max(b.acc.v[ag], o.clock); } arrive(w, b, 1); }
    return;
  }
  EACH(l, o.mask) { char* d = smem_ptr(w, o.dst[l], o.size); if (o.ssize[l]) memcpy(d, (const char*)o.src[l], o.ssize[l]); if (o.ssize[l] < o.size) memset(d + o.ssize[l], 0, o.size - o.ssize[l]); }
}
void cp_flush(Warp& w, u32 upto) {
  if (w.cpq.empty()) return;
  u32 clk = 0; size_t k = 0; for (; k < w.cpq.size() && w.cpq[k].group < upto; k++) { if (w.cpq[k].mask) cp_perform(w, w.cpq[k]); clk = std::max(clk, w.cpq[k].clock); }
  w.cpq.erase(w.cpq.begin(), w.cpq.begin() + (long)k); if (clk) acquire_own(w, A_CPASYNC, clk);
}
void bulk_flush(Warp& w, u32 upto) {
  u32 clk = 0; size_t k = 0; for (; k < w.bulkq.size() && w.bulkq[k].group < upto; k++) { if (!w.bulkq[k].done) w.bulkq[k].run(); clk = std::max(clk, w.bulkq[k].clock); }
  w.bulkq.erase(w.bulkq.begin(), w.bulkq.begin() + (long)k); if (clk) acquire_own(w, A_BULKST, clk);
}
bool deliver_one(Group& g, bool random) {
  if (!g.pending.empty()) { size_t k = random ? g.rnd() % g.pending.size() : 0; auto f = std::move(g.pending[k].run); g.pending.erase(g.pending.begin() + (long)k); f(); g.progress++; return true; }
  for (auto* w : g.warps) for (size_t k = 0; k < w->cpq.size(); k++) if (w->cpq[k].kind == 1 && w->cpq[k].mask) {
    for (size_t j = 0; j <= k; j++) if (w->cpq[j].mask) { cp_perform(*w, w->cpq[j]); w->cpq[j].mask = 0; }
    g.progress++; return true;
  }
  return false;
}

bool decode_async(Decoder& d) {
  const Stmt& s = *d.s; Inst& in = *d.in; const std::string& op = s.t[0];
  auto addr = [&](const Opd& o, Ext* e) {      // address-like operand into ext lists
    const Opd& b = o.k == Opd::Mem ? o.sub[0] : o; e->v.push_back(d.src(b, b.k == Opd::Reg ? "b64" : "b64")); e->w.push_back((u32)d.osize(b, 8)); e->targets.push_back((int)(o.k == Opd::Mem ? o.imm : 0)); };
  auto val32 = [&](const Opd& o, Ext* e) { e->v.push_back(d.src(o, "b32")); e->w.push_back((u32)d.osize(o, 4)); e->targets.push_back(0); };
  if (op == "mbarrier") {
    in.cls = C_MBAR; const std::string& k = s.t[1]; in.b = NOREF; in.d = NOREF;
    if (k == "test_wait" || k == "try_wait") { in.d = s.ops[0].k == Opd::Pair ? d.dst(s.ops[0].sub[0]) : d.dst(s.ops[0]); d.mem(s.ops[1], 0); in.x = (s.has("parity") ? 1 : 0) | (k == "try_wait" ? 2 : 0); in.b = d.src(s.ops[2], s.has("parity") ? "b32" : "b64"); in.fn = h_mbar_wait; return true; }
    if (k == "pending_count") { in.d = d.dst(s.ops[0]); in.fn = h_mbar_pending; return true; }
    in.fn = h_mbar; bool etx = s.has("expect_tx");
    if (k == "init") { in.x = 0; d.mem(s.ops[0], 0); in.b = d.src(s.ops[1], "u32"); return true; }
    if (k == "inval") { in.x = 1; d.mem(s.ops[0], 0); return true; }
    if (k == "expect_tx" || k == "complete_tx") { in.x = k == "expect_tx" ? 2 : 3; d.mem(s.ops[0], 0); in.b = d.src(s.ops[1], "u32"); return true; }
    if (k == "arrive" || k == "arrive_drop") {
      in.x = (k == "arrive" ? 4 : 6) + (etx ? 1 : 0); size_t q = 0; if (s.ops[0].k != Opd::Mem) { if (s.ops[0].k != Opd::Sink) in.d = d.dst(s.ops[0]); q = 1; }
      d.mem(s.ops[q], 0); if (s.ops.size() > q + 1) in.b = d.src(s.ops[q + 1], "u32"); return true;
    }
    return false;
  }
  if (op == "tensormap") {
    in.cls = C_TMA;
    if (s.t[1] == "replace") {
      static const std::unordered_map<std::string, int> fd = {{"global_address", FD_ADDR}, {"rank", FD_RANK}, {"box_dim", FD_BOX}, {"global_dim", FD_DIM}, {"global_stride", FD_STRIDE}, {"element_stride", FD_ESTRIDE}, {"elemtype", FD_ELEM}, {"interleave_layout", FD_INTER}, {"swizzle_mode", FD_SWZ}, {"fill_mode", FD_FILL}};
      int f = -1; for (auto& m : s.t) if (fd.count(m)) f = fd.at(m); if (f < 0) return false; in.x = (u32)f; d.mem(s.ops[0], 0); bool ord = s.ops.size() > 2; if (ord) { if (s.ops[1].k != Opd::ImmI) return false; in.y = (u32)s.ops[1].imm; }
      const Opd& v = s.ops.back(); bool b64 = s.last() == "b64"; in.b = d.src(v, b64 ? "b64" : "b32"); in.ds = (u8)d.osize(v, b64 ? 8 : 4); in.e = s.has("shared::cta"); in.fn = h_tmreplace; return true;
    }
    if (s.t[1] == "cp_fenceproxy") { d.mem(s.ops[0], 0); const Opd& b = s.ops[1].sub[0]; in.b = d.src(b, "b64"); in.ds = (u8)d.osize(b, 8); in.fn = h_tmcopy; return true; }
    return false;
  }
  // cp...
  bool bulk = s.has("bulk"), tensor = s.has("tensor"), red = s.t[1] == "reduce";
  if (!bulk) {
    in.cls = C_CPASYNC;
    if (s.has("commit_group")) { in.fn = h_cp_commit; return true; }
    if (s.has("wait_group") || s.has("wait_all")) { in.x = s.has("wait_all"); if (!in.x) { if (s.ops[0].k != Opd::ImmI) return false; in.imm = s.ops[0].imm; } in.fn = h_cp_wait; return true; }
    if (s.has("mbarrier")) { d.mem(s.ops[0], 0); in.x = s.has("noinc"); in.fn = h_cp_mbar; return true; }
    d.mem(s.ops[0], 0); const Opd& sm = s.ops[1]; const Opd& b = sm.sub[0]; in.b = d.src(b, "b64"); in.ds = (u8)d.osize(b, 8); Ext* e = d.ext(); e->w.push_back((u32)sm.imm);
    if (s.ops[2].k != Opd::ImmI) return false; in.sz = (u8)s.ops[2].imm; in.c = in.e = NOREF;
    size_t n = s.ops.size() - (s.has("L2::cache_hint") ? 1 : 0); if (n > 3) { const Opd& o = s.ops[3]; if (o.k == Opd::Reg && d.reg_bits(o) == 1) { bool ng; in.e = d.predsrc(o, ng); in.ftz = ng; } else in.c = d.src(o, "u32"); }
    in.fn = h_cpasync; return true;
  }
  in.cls = C_TMA;
  if (s.has("commit_group")) { in.fn = h_bulk_commit; return true; }
  if (s.has("wait_group")) { if (s.ops[0].k != Opd::ImmI) return false; in.imm = s.ops[0].imm; in.fn = h_bulk_wait; return true; }
  Ext* e = d.ext(); bool hint = s.has("L2::cache_hint"); bool to_shared = false; for (auto& m : s.t) if (m == "mbarrier::complete_tx::bytes") to_shared = true;
  if (s.has("prefetch")) { in.fn = h_nop; return true; }
  if (tensor) {
    if (s.has("im2col") || s.has("gather4") || s.has("tile::gather4") || s.has("scatter4") || s.has("tile::scatter4")) return false;
    for (int k = 1; k <= 5; k++) if (s.has(fmt("%dd", k).c_str())) in.n = (u8)k;
    const Opd &mapo = s.ops[to_shared ? 1 : 0], &sh = s.ops[to_shared ? 0 : 1]; if (mapo.k != Opd::Mem || mapo.sub.size() != 2 || mapo.sub[1].k != Opd::Vec) return false;
    Opd mo = mapo; addr(sh, e); addr(mo, e); bool mc = s.has("multicast::cluster");
    if (to_shared) addr(s.ops[2], e); else { e->v.push_back(e->v[0]); e->w.push_back(e->w[0]); e->targets.push_back(0); }
    if (mc) { const Opd& o = s.ops[3]; e->v.push_back(d.src(o, "b16")); e->w.push_back((u32)d.osize(o, 2)); e->targets.push_back(0); } else { e->v.push_back(e->v[0]); e->w.push_back(e->w[0]); e->targets.push_back(0); }
    for (auto& c : mapo.sub[1].sub) val32(c, e);
    if (mapo.sub[1].sub.size() != in.n) d.fail("coordinate count mismatch");
    in.x = to_shared ? 0 : 1; in.y = (u32)(red ? red_of(s) : 0) | (u32)mc << 16; in.fn = h_tensor; (void)hint; return true;
  }
  bool src_shared = false; for (size_t k = 1; k < s.t.size(); k++) if (s.t[k] == "global" && k + 1 < s.t.size() && s.t[k + 1] == "shared::cta") src_shared = true;
  addr(s.ops[0], e); addr(s.ops[1], e); val32(s.ops[2], e);
  int el = 0; if (red) { el = elem_of(s.last()); if (s.last() == "noftz") el = elem_of(s.t[s.t.size() - 2]); for (auto& m : s.t) if (elem_of(m) >= 0) el = elem_of(m); if (el < 0) return false; }
  bool mc = s.has("multicast::cluster");
  if (to_shared) { addr(s.ops[3], e); if (mc) { const Opd& o = s.ops[4]; e->v.push_back(d.src(o, "b16")); e->w.push_back((u32)d.osize(o, 2)); e->targets.push_back(0); } in.x = s.has("global") ? 0 : 2; } else { if (!src_shared) return false; in.x = 1; }
  in.y = (u32)(red ? red_of(s) : 0) | (u32)el << 8 | (u32)mc << 16; in.fn = h_bulk; return true;
}
}  // namespace cusim
