"""A rough estimate of which unit bounds a kernel, from the simulator's counters.  An ESTIMATE: no latency, no overlap model."""

CHIPS = {  # per SM and clock
    "H100": {
        "sms": 132,
        "ghz": 1.755,
        "flop16": 4096,
        "flop8": 8192,
        "flop32t": 2048,
        "mufu": 16,
        "fp32": 128,
        "smem": 128,
        "issue": 4,
        "dram": 3.35e12,
        "l2": 5.5e12,
    },
    "H200": {
        "sms": 132,
        "ghz": 1.755,
        "flop16": 4096,
        "flop8": 8192,
        "flop32t": 2048,
        "mufu": 16,
        "fp32": 128,
        "smem": 128,
        "issue": 4,
        "dram": 4.8e12,
        "l2": 5.5e12,
    },
    "A100": {
        "sms": 108,
        "ghz": 1.41,
        "flop16": 2048,
        "flop8": 4096,
        "flop32t": 1024,
        "mufu": 16,
        "fp32": 64,
        "smem": 128,
        "issue": 4,
        "dram": 1.55e12,
        "l2": 3.5e12,
    },
}


def roofline(stats, chip="H200"):
    """stats: LaunchResult.stats of a launch with counters=True.  Returns times in microseconds per unit, whole chip busy."""
    c = CHIPS[chip]
    clk = c["sms"] * c["ghz"] * 1e9
    cyc = {
        "tensor": stats["mma_flops_16bit"] / c["flop16"] + stats["mma_flops_8bit"] / c["flop8"] + stats["mma_flops_tf32"] / c["flop32t"],
        "mufu": stats["mufu_lanes"] / c["mufu"],
        "fp32": stats["fp32_lanes"] / c["fp32"],
        "smem": stats["smem_wavefronts"] + (stats["wgmma_smem_bytes"] + stats["tma_bytes"]) / c["smem"],
        "issue": (stats["inst"]) / c["issue"],
    }
    us = {k: v / clk * 1e6 for k, v in cyc.items()}
    us["l2"] = (stats["gmem_sectors"] * 32 + stats["tma_bytes"] + stats["cp_async_bytes"]) / c["l2"] * 1e6
    bound = max(us, key=us.get)
    return {
        "estimate_only": True,
        "chip": chip,
        "bound": bound,
        "lower_bound_us": us[bound],
        "us": us,
        "bank_conflict_ratio": stats["smem_wavefronts"] / max(1, stats["smem_ideal_wavefronts"]),
        "coalescing_ratio": stats["gmem_sectors"] / max(1, stats["gmem_ideal_sectors"]),
    }
