//! All integration tests of this crate are one program: it links once, and its tests share the cores.

#[path = "../../converter/tests/common/gguf.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "the converter's tests use the rest of it")]
mod gguf;
#[path = "../../converter/tests/common/safetensors.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "the converter's tests use the rest of it")]
mod safetensors;

mod act_order;
mod batch;
mod budget;
mod cancel;
mod chat_model;
mod connections;
mod corruption;
mod dependencies;
mod drafts;
mod estimate;
mod families;
mod first_token;
mod forms;
mod fuzz_regressions;
mod generations;
mod gguf_types;
mod hostile;
mod invariance;
mod kept;
mod key_blocks;
mod models_doc;
mod ngrams;
mod pages;
mod parity;
mod passes;
mod prediction;
mod prompt_attention;
mod quality;
mod report;
mod resumed;
mod scheduling;
mod segments;
mod sequences;
mod session_store;
mod sessions;
mod sizes;
mod stripes;
mod synth;
mod thrift;
