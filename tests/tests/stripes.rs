//! Models that are striped compute the same bits as in one file, whatever is striped, over how many folders, and however much is in memory.

use std::fs;
use std::path::{Path, PathBuf};

use sluice_converter::{Options, Striping, TypeChoice, convert, restripe};
use sluice_format::{Codec, ExtentKind, ModelFile, Shares, WeightType};
use sluice_model::{Engine, EngineOptions, ReadEngineKind, RuntimeError};
use sluice_storage::io::IoConfig;
use sluice_tests::{Converted, Golden, fixture, greedy};

const PROMPT: [u32; 7] = [838, 29, 202, 17, 5, 999, 1];

/// Folders `name-0`, `name-1`, …, one for each share.
fn striping(dir: &Path, name: &str, shares: &[u32]) -> Striping {
    let folders: Vec<PathBuf> = (0..shares.len()).map(|number| dir.join(format!("{name}-{number}"))).collect();
    folders.iter().for_each(|folder| fs::create_dir_all(folder).unwrap());
    Striping::new(folders, Shares::new(shares).unwrap()).unwrap()
}

fn run(path: &Path, options: EngineOptions) -> (Vec<u32>, Vec<Vec<f32>>) {
    let options = EngineOptions { forget: true, threads: Some(2), ..options };
    greedy(&mut Engine::open(path, &options).unwrap(), &PROMPT, 12)
}

fn first_logits(path: &Path) -> Result<Vec<f32>, RuntimeError> {
    let options = EngineOptions { forget: true, threads: Some(2), ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options)?;
    let (mut sequence, mut logits) = (engine.new_sequence(), Vec::new());
    engine.forward(&mut sequence, &PROMPT, &mut logits)?;
    Ok(logits)
}

fn least(path: &Path) -> u64 {
    match Engine::open(path, &EngineOptions { budget: Some(1), ..EngineOptions::default() }) {
        Err(RuntimeError::Budget(e)) => e.least,
        _ => panic!("a budget of one byte is refused"),
    }
}

#[test]
fn striped_or_not_the_bits_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let choice = TypeChoice::Type(WeightType::Bf16);
    for compress in [false, true] {
        let options = Options { expert_type: choice, dense_type: choice, compress, ..Options::default() };
        let whole = dir.path().join(format!("{compress}.sluice"));
        convert(&fixture("demo-model"), &whole, &options, &()).unwrap();
        let want = run(&whole, EngineOptions::default());
        // Of the last, one stripe has nearly all, and a norm of a page has only one.
        for (round, shares) in [&[1, 1][..], &[2, 1], &[1, 2, 1], &[99, 1]].into_iter().enumerate() {
            let over = striping(dir.path(), &format!("{compress}-{round}"), shares);
            let made = restripe(&whole, None, &over, false, &()).unwrap();
            let model = ModelFile::open(&made.files[0]).unwrap();
            let experts = || model.extents().iter().filter(|e| e.kind == ExtentKind::Expert);
            assert!(experts().all(|e| (e.codec == Codec::Planes) == compress));
            assert!(experts().any(|e| model.stripes(e).len() > 1) || shares == [99, 1]);
            assert!(model.extents().iter().any(|e| model.stripes(e).len() == 1), "short ones are whole");
            let path = model.path();
            assert!(run(path, EngineOptions::default()) == want, "{shares:?} {compress}");
            // So little memory that experts and dense parts come again and again; small chunks; the other engine.
            let io = IoConfig { chunk_bytes: 4096, depth: 3, prefetch_depth: 2, verify: true };
            let tight = EngineOptions { budget: Some(least(path) + 4096), ..EngineOptions::default() };
            let pread = EngineOptions { read_engine: Some(ReadEngineKind::Pread), io: Some(io), ..tight.clone() };
            for options in [tight, pread] {
                assert!(run(path, options) == want, "{shares:?} {compress}, little memory");
            }
        }
    }
}

#[test]
fn a_damaged_stripe_ends_the_run_with_its_volume() {
    let dir = tempfile::tempdir().unwrap();
    for compress in [false, true] {
        let choice = TypeChoice::Type(WeightType::Bf16);
        let over = striping(dir.path(), &format!("{compress}"), &[1, 1]);
        let striping = Some(over.clone());
        let options = Options { expert_type: choice, dense_type: choice, compress, striping, ..Options::default() };
        let made = convert(&fixture("demo-model"), &over.destination(Path::new("m")), &options, &()).unwrap();
        let sound = fs::read(&made.files[1]).unwrap();
        let model = ModelFile::open(&made.files[0]).unwrap();
        for kind in [ExtentKind::Expert, ExtentKind::Attention, ExtentKind::Head] {
            let mut damaged = sound.clone();
            for e in model.extents().iter().filter(|e| e.kind == kind) {
                let second = model.stripes(e).iter().find(|stripe| stripe.volume == 1);
                second.into_iter().for_each(|stripe| damaged[stripe.offset as usize + 5] ^= 1);
            }
            fs::write(&made.files[1], damaged).unwrap();
            let error = first_logits(&made.files[0]).unwrap_err().to_string();
            let volume = made.files[1].display().to_string();
            assert!(error.contains(&volume) && error.contains("damaged"), "{kind}: {error}");
        }
    }
}

/// Rows of tables are read one by one, each from the volume that has its part.
#[test]
fn rows_of_tables_come_from_all_volumes() {
    const FAMILY: &str = "qwen4_exp";
    let model = Converted::new(&format!("golden/{FAMILY}"), None);
    let dir = tempfile::tempdir().unwrap();
    let tokens = Golden::load(FAMILY).ids("input_ids");
    let logits = |path: &Path| {
        let options = EngineOptions { threads: Some(2), forget: true, ..EngineOptions::default() };
        let mut engine = Engine::open(path, &options).unwrap();
        let (mut sequence, mut all) = (engine.new_sequence(), Vec::new());
        for tokens in tokens.chunks(7) {
            engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
        }
        all
    };
    let want = logits(&model.path);
    for shares in [&[1, 1][..], &[3, 1, 2]] {
        let over = striping(dir.path(), &format!("{}", shares.len()), shares);
        let made = restripe(&model.path, None, &over, false, &()).unwrap();
        let striped = ModelFile::open(&made.files[0]).unwrap();
        let tables = striped.extents().iter().filter(|e| e.kind == ExtentKind::Table);
        let mut volumes: Vec<u16> = tables.map(|e| e.volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        assert_eq!(volumes.len(), shares.len(), "every volume has some");
        assert!(logits(&made.files[0]) == want, "{shares:?}");
    }
}
