//! The tables of `docs/MODELS.md` that follow from configurations: sizes, token cycles, memory and speeds of published models.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sluice_converter::synth::{Geometry, KindTypes, Layout, WeightTypes};
use sluice_format::{PAGE_SIZES, WeightType};
use sluice_lab::estimate::{Machine, Needs, Speed};
use sluice_lab::schedule::USUAL_LATENCY;
use sluice_model::KvType;
use sluice_model::memory::{Demand, MemoryPlan};

/// The models by the names of their geometries, with their titles.
const MODELS: [(&str, &str); 46] = [
    ("deepseek-r1", "DeepSeek-V3, R1, V3.1"),
    ("deepseek-v3.2", "DeepSeek-V3.2"),
    ("deepseek-v4-flash", "DeepSeek-V4-Flash"),
    ("deepseek-v4-pro", "DeepSeek-V4-Pro"),
    ("deepseek-v2", "DeepSeek-V2, V2.5, Coder-V2"),
    ("deepseek-v2-lite", "DeepSeek-V2-Lite"),
    ("kimi-k2", "Kimi K2"),
    ("kimi-k2-thinking", "Kimi K2-Thinking, K2.5, K2.6"),
    ("kimi-linear-48b", "Kimi Linear 48B-A3B"),
    ("glm-5", "GLM-5, 5.1"),
    ("glm-5.2", "GLM-5.2, 5.3"),
    ("glm-4.6", "GLM-4.5, 4.6, 4.7"),
    ("glm-4.5-air", "GLM-4.5-Air"),
    ("glm-4.7-flash", "GLM-4.7-Flash"),
    ("qwen3.5-397b", "Qwen3.5-397B"),
    ("qwen3.5-122b", "Qwen3.5-122B"),
    ("qwen3.5-35b", "Qwen3.5, 3.6-35B"),
    ("qwen3-next-80b", "Qwen3-Next-80B, Coder-Next"),
    ("qwen3-coder-480b", "Qwen3-Coder-480B"),
    ("qwen3-235b", "Qwen3-235B"),
    ("qwen3-30b", "Qwen3-30B, Coder-30B"),
    ("qwen2-57b", "Qwen2-57B"),
    ("qwen1.5-moe", "Qwen1.5-MoE"),
    ("gpt-oss-120b", "gpt-oss-120b"),
    ("gpt-oss-20b", "gpt-oss-20b"),
    ("minimax-m3", "MiniMax-M3"),
    ("minimax-m2", "MiniMax-M2 to M2.7"),
    ("mixtral-8x22b", "Mixtral 8x22B"),
    ("mixtral-8x7b", "Mixtral 8x7B"),
    ("llama-4-maverick", "Llama 4 Maverick"),
    ("llama-4-scout", "Llama 4 Scout"),
    ("ernie-4.5-300b", "ERNIE 4.5 300B-A47B"),
    ("ernie-4.5-21b", "ERNIE 4.5 21B-A3B"),
    ("hy3", "Hunyuan 3"),
    ("hunyuan-a13b", "Hunyuan-A13B"),
    ("mimo-v2-flash", "MiMo-V2-Flash"),
    ("granite-3.1-3b-a800m", "Granite 3.0, 3.1 3B-A800M"),
    ("granite-3.1-1b-a400m", "Granite 3.0, 3.1 1B-A400M"),
    ("olmoe-7b", "OLMoE"),
    ("llama-3.1-405b", "Llama 3.1 405B"),
    ("llama-3.1-70b", "Llama 3.1 70B"),
    ("llama-3.1-8b", "Llama 3.1 8B"),
    ("mistral-7b", "Mistral 7B"),
    ("qwen3-32b", "Qwen3-32B"),
    ("qwen3-8b", "Qwen3-8B"),
    ("ernie-4.5-0.3b", "ERNIE 4.5 0.3B"),
];

/// Geometries that are not published models.
const MADE_UP: [&str; 1] = ["bench-34x128"];

/// Types whose token cycles are listed.
const CYCLES: [(&str, WeightType); 6] = [
    ("bf16", WeightType::Bf16),
    ("fp8", WeightType::Fp8),
    ("q8", WeightType::Q8),
    ("int4", WeightType::Int4),
    ("mxfp4, q4", WeightType::Q4),
    ("q3", WeightType::Q3),
];

const GIB: u64 = 1 << 30;

/// Machines whose speeds are listed: available memory, drive, memory bandwidth.
const MACHINES: [(u64, u64, u64); 3] = [(16, 3, 50), (64, 7, 80), (256, 14, 300)];

/// Tokens of context for memory and speed.
const CONTEXT: usize = 4096;

/// Step of memory in which the size that holds the dense parts is searched: the last printed digit.
const MEMORY_STEP: u64 = GIB / 10;

/// Beginning and end of the generated part.
const MARKS: [&str; 2] = [
    "<!-- Made by `cargo run --release -p sluice-tests --example models-table`: -->\n",
    "<!-- The end of what is made. -->\n",
];

/// `docs/MODELS.md` with updated tables. The parity errors come from its table of families.
///
/// # Errors
/// If the document or the list of models lacks something.
pub fn renewed(doc: &str) -> Result<String, String> {
    let listed = |name: &str| MODELS.iter().any(|(model, _)| *model == name) || MADE_UP.contains(&name);
    if let Some(name) = Geometry::presets().find(|name| !listed(name)) {
        return Err(format!("{name} is not in the list of models"));
    }
    let begin = doc.find(MARKS[0]).ok_or("the mark where the tables begin is missing")? + MARKS[0].len();
    let len = doc[begin..].find(MARKS[1]).ok_or("the mark where the tables end is missing")?;
    let parity = parity(doc);
    let models: Vec<Model> = MODELS.iter().map(|model| Model::new(model, &parity)).collect::<Result<_, _>>()?;
    Ok(format!("{}\n{}\n{}{}", &doc[..begin], reads(&models), needs(&models)?, &doc[begin + len..]))
}

/// Parity errors by `model_type`.
fn parity(doc: &str) -> BTreeMap<String, String> {
    let rows = doc.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, types, _, errors, _] = cells[..] else { return None };
        errors.contains("e-").then_some((types, errors))
    });
    let names = |(types, errors): (&str, &str)| -> Vec<(String, String)> {
        types.split(',').map(|name| (name.trim().replace('`', ""), errors.to_owned())).collect()
    };
    rows.flat_map(names).collect()
}

struct Model {
    title: &'static str,
    geometry: Geometry,
    parity: String,
}

impl Model {
    fn new((name, title): &(&'static str, &'static str), parity: &BTreeMap<String, String>) -> Result<Self, String> {
        let geometry = Geometry::load(name, None).map_err(|e| format!("{name}: {e}"))?;
        let family = &geometry.spec().family;
        let parity = parity.get(family).ok_or_else(|| format!("the table of families lacks {family}"))?.clone();
        Ok(Model { title, geometry, parity })
    }

    fn layout(&self, types: KindTypes) -> Result<Layout, String> {
        Layout::by_kind(self.geometry.spec(), types, PAGE_SIZES[0]).map_err(|e| format!("{}: {e}", self.title))
    }
}

/// The table of what a token reads.
fn reads(models: &[Model]) -> String {
    let mut out = "| model | weights | experts per token × layers | weights for every token |".to_owned();
    CYCLES.iter().for_each(|(name, _)| out += &format!(" {name} |"));
    out += " parity error |\n|---|---|---|---|";
    out += &"---|".repeat(CYCLES.len() + 1);
    for model in models {
        let spec = model.geometry.spec();
        let weights = model.geometry.weights();
        let moe = || spec.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref());
        let experts = moe().next().map_or("none".to_owned(), |first| format!("{} × {}", first.top_k, moe().count()));
        let _ = write!(
            out,
            "\n| {} | {} B | {experts} | {} B |",
            model.title,
            digits(weights.all as f64 / 1e9),
            digits(weights.every_token as f64 / 1e9)
        );
        // All routed experts of a token, without padding.
        let chosen = |ty: WeightType| -> f64 {
            let matrix = |rows: usize, cols: usize| ty.matrix_len(rows, cols).unwrap_or(0) as f64;
            let one = |width: usize| 2.0 * matrix(width, spec.hidden_size) + matrix(spec.hidden_size, width);
            moe().map(|m| m.top_k as f64 * one(m.width)).sum()
        };
        for (_, ty) in CYCLES {
            let cycle = chosen(ty) / 1e9;
            let _ = write!(out, " {} |", if cycle > 0.0 { digits(cycle) } else { "–".to_owned() });
        }
        let _ = write!(out, " {} |", model.parity);
    }
    out + "\n"
}

/// The table of what a model needs, and how fast machines can be.
fn needs(models: &[Model]) -> Result<String, String> {
    let mut out = "## What a model needs\n\n".to_owned();
    let machine = |(ram, ssd, memory): (u64, u64, u64)| {
        format!("{ram} GiB available, a drive of {ssd} GB/s, memory of {memory} GB/s")
    };
    let [a, b, c] = MACHINES.map(machine);
    let _ = write!(
        out,
        "This is what `sluice plan` says for a context of {CONTEXT} tokens, for each model as published and, if that is larger, with\n\
         experts in `q4` and the rest in `q8` (without experts: all in `q4`). With the *least memory*, the dense parts are read again for\n\
         every token. With the memory in the next column they stay in memory, and the rest caches experts. With that in the column after\n\
         it, nothing is read twice.\n\
         The last three columns are upper bounds in tokens per second for three machines, by their drives and memories alone:\n\n\
         - A: {a};\n- B: {b};\n- C: {c}.\n\n`–` means that the memory does not suffice.\n\n\
         | model | types (experts, dense) | file, GB | token cycle, GB | least memory, GiB | dense parts held, GiB | all held, GiB | A | B | C |\n\
         |---|---|---|---|---|---|---|---|---|---|\n"
    );
    for model in models {
        let release = model.geometry.release().ok_or_else(|| format!("{}: no release is known", model.title))?;
        out += &row(model, release.types)?;
        let is_dense = model.geometry.spec().routed_per_token() == 0;
        if bits(release.types.experts) > bits(WeightType::Q4) + 0.5 {
            let dense = if is_dense { WeightType::Q4 } else { WeightType::Q8 };
            out += &row(model, WeightTypes { experts: WeightType::Q4, dense }.by_kind())?;
        }
    }
    Ok(out)
}

fn row(model: &Model, types: KindTypes) -> Result<String, String> {
    let (spec, layout) = (model.geometry.spec(), model.layout(types)?);
    let extents = layout.extents();
    let kv_type = KvType::default();
    let context = CONTEXT.min(spec.max_positions);
    let needs = Needs::of(spec, extents, context, kv_type);
    let is_held = |memory: u64| {
        let plan = MemoryPlan::of_extents(spec, extents, Some(memory), Demand::one(context, kv_type), u64::MAX / 2);
        plan.is_ok_and(|plan| plan.dense_streamed == 0)
    };
    // The first step of memory at which nothing of the dense parts is streamed.
    let (mut below, mut held) = (0, needs.best_memory.div_ceil(MEMORY_STEP));
    while held - below > 1 {
        let step = below + (held - below) / 2;
        if is_held(step * MEMORY_STEP) { held = step } else { below = step }
    }
    let names = match needs.experts {
        0 => types.dense.name().to_owned(),
        _ => format!("{}, {}", types.experts.name(), types.dense.name()),
    };
    let gib = |bytes: u64| tenths(bytes as f64 / GIB as f64);
    let file = layout.file_bytes(spec.to_json().len() + model.geometry.config().len());
    let cycle = if needs.experts == 0 { "–".to_owned() } else { digits(needs.token_cycle_bytes as f64 / 1e9) };
    let mut out = format!(
        "| {} | {names} | {} | {cycle} | {} | {} | {} |",
        model.title,
        digits(file as f64 / 1e9),
        gib(needs.least_memory),
        gib(held * MEMORY_STEP),
        gib(needs.best_memory),
    );
    for (ram, ssd, memory) in MACHINES {
        let machine = Machine {
            ram: ram * GIB,
            ssd: ssd * 1_000_000_000,
            ssd_latency: USUAL_LATENCY,
            memory_bandwidth: memory * 1_000_000_000,
        };
        let speed = Speed::of(spec, extents, machine, context, kv_type);
        out += &speed.map_or(" – |".to_owned(), |speed| format!(" {} |", digits(speed.tokens_per_second)));
    }
    Ok(out + "\n")
}

/// Bits per weight, scales included.
fn bits(ty: WeightType) -> f64 {
    let (rows, cols) = (128, 4096);
    8.0 * ty.matrix_len(rows, cols).unwrap_or(0) as f64 / (rows * cols) as f64
}

/// Three significant digits, but at most two after the point.
fn digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// One digit after the point, rounded up, so that the printed size suffices.
fn tenths(value: f64) -> String {
    let value = (value * 10.0).ceil() / 10.0;
    if value < 100.0 { format!("{value:.1}") } else { format!("{:.0}", value.ceil()) }
}
