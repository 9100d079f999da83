//! Attention to chosen blocks of keys gives the same bits whether the blocks are read in place or gathered first.

use std::fs;

use serde_json::{Value, json};
use sluice_converter::{Options, convert};
use sluice_model::{Control, Engine, EngineOptions, Span, Want};
use sluice_tests::{Golden, fixture};

const FAMILY: &str = "minimax_m3";
const TOKENS: usize = 250;

/// The residual stream after the first layer that chooses blocks, if it chooses the last `blocks` blocks of `block_len` keys each.
fn stream(block_len: usize, blocks: usize, step: usize) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let golden = fixture("golden").join(FAMILY);
    let mut config: Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    let sparse = &mut config["text_config"]["sparse_attention_config"];
    sparse["sparse_block_size"] = json!(block_len);
    sparse["sparse_topk_blocks"] = json!(blocks);
    sparse["sparse_local_block"] = json!(blocks);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(golden.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let path = folder.path().join("model.sluice");
    convert(folder.path(), &path, &Options::default(), &()).unwrap();

    let options = EngineOptions { context: Some(TOKENS), forget: true, threads: Some(2), ..EngineOptions::default() };
    let mut engine = Engine::open(&path, &options).unwrap();
    let ids = Golden::load(FAMILY).ids("input_ids");
    let tokens: Vec<u32> = ids.into_iter().cycle().take(TOKENS).collect();
    let (mut sequence, mut all) = (engine.new_sequence(), Vec::new());
    for tokens in tokens.chunks(step) {
        let mut hidden = |layers: usize, stream: &[f32]| {
            if layers == 2 {
                all.extend_from_slice(stream);
            }
        };
        let mut control = Control { hidden: Some(&mut hidden), ..Control::default() };
        let span = Span::prompt(&mut sequence, tokens, Want::Nothing);
        engine.step(&mut [span], &mut control, &mut |_, _, _| ()).unwrap();
    }
    all
}

#[test]
fn blocks_in_pages_and_gathered_ones_give_the_same_bits() {
    // Two blocks of 64 are the rows of two pages; four blocks of 32 have to be gathered. A token in the second half of a page sees
    // the same keys in both cases.
    let (pages, gathered) = (stream(64, 2, TOKENS), stream(32, 4, TOKENS));
    let width = pages.len() / TOKENS;
    let row = |stream: &[f32], token: usize| stream[token * width..][..width].to_vec();
    let second_half: Vec<usize> = (0..TOKENS).filter(|token| token % 64 >= 32).collect();
    assert!(second_half.iter().all(|&token| row(&pages, token) == row(&gathered, token)));
    // In the first half, four blocks of 32 begin half a page later.
    assert!((128..160).any(|token| row(&pages, token) != row(&gathered, token)), "no token has chosen");
    assert!(stream(64, 2, 7) == pages && stream(32, 4, 7) == gathered, "other steps give other bits");
}
