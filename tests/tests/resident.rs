//! Memory that a model releases really goes back to the system: resident memory, in a process that does nothing else.
#![cfg(target_os = "linux")]

use sluice_converter::synth::{Geometry, SynthOptions, WeightTypes, synth};
use sluice_format::WeightType;
use sluice_model::{Engine, EngineOptions, ReadEngineKind};

const MIB: u64 = 1 << 20;
/// Bytes of a page on the systems where tests run.
const PAGE: u64 = 4096;

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * PAGE
}

/// Bytes that the kernel pins in memory, for example for a ring in which they are registered.
fn pinned() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn decode(engine: &mut Engine, tokens: u32) -> Vec<f32> {
    let mut sequence = engine.new_sequence();
    let mut logits = Vec::new();
    engine.forward(&mut sequence, &[1, 2, 3, 4, 5], &mut logits).unwrap();
    for token in 0..tokens {
        engine.decode(&mut sequence, token * 37 % 1000, &mut logits).unwrap();
    }
    logits
}

#[test]
fn bytes_given_back_leave_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "deepseek_v3", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 256,
        "moe_intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "n_shared_experts": 0,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0, "q_lora_rank": null, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 1024
    });
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
    let path = folder.path().join("model.sluice");
    let types = WeightTypes { experts: WeightType::Q8, dense: WeightType::Q8 };
    synth(&geometry, &path, &SynthOptions::new(types), &()).unwrap();

    for read_engine in [ReadEngineKind::Auto, ReadEngineKind::Pread] {
        let before = resident();
        let options = EngineOptions {
            read_engine: Some(read_engine),
            context: Some(256),
            threads: Some(2),
            forget: true,
            ..EngineOptions::default()
        };
        let mut engine = Engine::open(&path, &options).unwrap();
        engine.wait_for_dense().unwrap();
        let plan = engine.memory().clone();
        assert_eq!(plan.slots, plan.experts);
        let slots = plan.slots as u64 * plan.slot_len;
        assert!(slots > 100 * MIB, "the model is too small for this test: {slots}");
        let opened = resident() - before;
        assert!(opened < plan.dense + 16 * MIB, "{read_engine:?}: opening takes {opened} bytes, slots have {slots}");
        let want = decode(&mut engine, 20);
        // Slots have memory if they have been filled.
        let filled =
            |engine: &Engine| engine.residency().iter().map(|layer| layer.count() as u64).sum::<u64>() * plan.slot_len;
        let (full, registered) = (resident(), pinned());
        assert!(filled(&engine) > slots / 4 && full - before > filled(&engine), "{read_engine:?}");

        // Half of the slots, and all but two.
        for part in [2, 1] {
            let bytes = plan.least() + (part - 1) * (plan.most() - plan.least()) / 2;
            engine.set_budget(bytes).unwrap();
            let most = before + engine.memory().used() + 12 * MIB;
            assert!(resident() < most, "{read_engine:?}: {} bytes stay in the process, {most} may", resident());
            assert!(decode(&mut engine, 20) == want);
            assert!(resident() < most, "{read_engine:?}: steps keep the smaller budget");
            let kept = pinned();
            let may = engine.memory().used() + 4 * MIB;
            assert!(kept < may, "{read_engine:?}: a registration keeps {kept} bytes, {may} may be kept");
        }
        let small = resident();
        engine.set_budget(plan.most()).unwrap();
        assert!(resident() < small + 4 * MIB, "memory comes when it is needed");
        assert!(decode(&mut engine, 20) == want);
        assert!(resident() + 8 * MIB > full, "{read_engine:?}: and it comes back");
        println!("{read_engine:?}: {} MiB registered at first, {} now", registered / MIB, pinned() / MIB);

        engine.release_idle();
        let left = resident().saturating_sub(before);
        assert!(left < 12 * MIB, "{read_engine:?}: a model at rest holds {left} bytes");
        assert!(decode(&mut engine, 20) == want);
        assert!(resident() + 8 * MIB > full);
        drop(engine);
    }
}
