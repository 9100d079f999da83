//! Saved segments: a sequence that is assembled from several files continues with the same bits as one that was never saved.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sluice_model::session::{HEADER_FIELDS, PrefixHash, SECTION_FIELDS, SegmentFile, SegmentInfo, SessionError, peek};
use sluice_model::{Engine, EngineOptions, KvType, PAGE_TOKENS, Sequence};
use sluice_tests::{ATTENTIONS, Converted, Golden, forgets};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

fn options() -> EngineOptions {
    EngineOptions {
        context: Some(250),
        sequences: Some(4),
        marks: 2,
        mark_every: Some(10_000),
        kv_type: KvType::Q8,
        forget: true,
        ..EngineOptions::default()
    }
}

fn tokens(family: &str, count: usize) -> Vec<u32> {
    let ids = Golden::load(family).ids("input_ids");
    let (there, back) = (ids.iter(), ids.iter().rev());
    there.chain(back).copied().cycle().enumerate().map(|(i, id)| (id + i as u32 / 50) % 90).take(count).collect()
}

fn logits(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    engine.forward_all(sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
    all
}

fn read(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32]) {
    engine.forward(sequence, tokens, &mut Vec::new()).unwrap();
}

fn open(paths: &[PathBuf]) -> Vec<SegmentFile> {
    paths.iter().map(|path| SegmentFile { file: fs::File::open(path).unwrap(), path: path.clone() }).collect()
}

/// Three files: `0..100` with a mark at 70, `64..200` with one at 150, and `192..240`.
struct Chain {
    paths: Vec<PathBuf>,
    tokens: Vec<u32>,
    _folder: tempfile::TempDir,
}

fn chain(engine: &mut Engine, family: &str) -> Chain {
    let folder = tempfile::tempdir().unwrap();
    let (mut sequence, tokens) = (engine.new_sequence(), tokens(family, 250));
    let mut paths = Vec::new();
    for (start, marked, end) in [(0, 70, 100), (64, 150, 200), (192, 240, 240)] {
        let at = sequence.position();
        read(engine, &mut sequence, &tokens[at..marked]);
        if marked < end {
            sequence.mark().unwrap();
            read(engine, &mut sequence, &tokens[marked..end]);
        }
        paths.push(folder.path().join(format!("{start}")));
        sequence.save_file_from(paths.last().unwrap(), start).unwrap();
        assert_eq!(fs::metadata(paths.last().unwrap()).unwrap().len(), sequence.saved_len(start).unwrap());
    }
    Chain { paths, tokens, _folder: folder }
}

/// The chain with the logits behind each token of its text, and how many these are for a token.
fn chain_and_logits(engine: &mut Engine, family: &str) -> (Chain, Vec<f32>, usize) {
    let chain = chain(engine, family);
    let mut alone = engine.new_sequence();
    let want = logits(engine, &mut alone, &chain.tokens);
    let vocab = want.len() / chain.tokens.len();
    (chain, want, vocab)
}

#[test]
fn a_chain_goes_on_with_the_same_bits_wherever_it_can() {
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&options());
        let (Chain { paths, tokens, _folder }, want, vocab) = chain_and_logits(&mut engine, family);
        // The number of wanted tokens, of the files for them, and of the tokens that the sequence then has if it cannot go back to
        // any token.
        let cases = [(250, 3, 240), (240, 3, 240), (239, 3, 200), (200, 2, 200), (190, 2, 150), (149, 2, 100)];
        for (wanted, files, reached) in cases.into_iter().chain([(99, 1, 70), (70, 1, 70), (69, 1, 0)]) {
            let mut back = engine.restore_segments(&mut open(&paths[..files]), &tokens[..wanted]).unwrap();
            let expected = if forgets(family) { reached } else { wanted.min(240) };
            assert_eq!(back.tokens(), &tokens[..expected], "{family}: {wanted} of {files} files");
            let at = back.position();
            let end = tokens.len().min(at + 20);
            assert!(logits(&mut engine, &mut back, &tokens[at..end]) == want[at * vocab..end * vocab], "{family} {at}");
        }
        // A text that diverges from the stored one.
        let mut other = tokens.clone();
        other[170] = (other[170] + 1) % 90;
        let back = engine.restore_segments(&mut open(&paths[..2]), &other).unwrap();
        assert_eq!(back.position(), if forgets(family) { 150 } else { 170 }, "{family}");
        assert!(engine.restore_segments(&mut [], &tokens).unwrap().tokens().is_empty());
        // An engine with less room takes what fits.
        for (context, reached) in [(80, 70), (50, 0)] {
            let mut short = model.open(&EngineOptions { context: Some(context), ..options() });
            let mut back = short.restore_segments(&mut open(&paths), &tokens).unwrap();
            let expected = if forgets(family) { reached } else { context };
            assert_eq!(back.tokens(), &tokens[..expected], "{family}");
            let end = context.min(expected + 5);
            assert!(
                expected == end
                    || logits(&mut short, &mut back, &tokens[expected..end]) == want[expected * vocab..end * vocab]
            );
        }
    }
}

#[test]
fn a_segment_is_appended_to_what_it_continues() {
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&options());
        let (Chain { paths, tokens, _folder }, want, vocab) = chain_and_logits(&mut engine, family);
        let mut back = engine.restore_file(&paths[0]).unwrap();
        assert!(matches!(engine.restore_onto(&mut back, &paths[2]), Err(SessionError::Continues { start: 192, .. })));
        assert_eq!((back.position(), back.marks().count()), (100, 1));
        engine.restore_onto(&mut back, &paths[1]).unwrap();
        let marks: Vec<_> = back.marks().map(|mark| mark.position()).collect();
        assert_eq!((back.tokens(), marks), (&tokens[..200], vec![70, 150]), "{family}");
        engine.restore_onto(&mut back, &paths[2]).unwrap();
        for at in [240, 150, 70] {
            assert_eq!(back.rewind_to(at).unwrap(), at, "{family}");
            let mut fork = back.fork();
            assert!(logits(&mut engine, &mut fork, &tokens[at..at + 10]) == want[at * vocab..(at + 10) * vocab]);
        }
        drop(back);
        assert!(engine.pages().iter().all(|pages| pages.free == pages.total), "{family}: every page comes back");
        // After another text, it is refused, and the sequence stays as it was.
        let mut strange = engine.new_sequence();
        read(&mut engine, &mut strange, &tokens[1..101]);
        assert!(matches!(engine.restore_onto(&mut strange, &paths[1]), Err(SessionError::OtherText { start: 64, .. })));
        assert_eq!(strange.tokens(), &tokens[1..101]);
        assert!(matches!(engine.restore_file(&paths[1]), Err(SessionError::Continues { start: 64, position: 0, .. })));
    }
}

#[test]
fn a_file_says_what_it_has() {
    let model = Converted::new("golden/qwen3_next", None);
    let mut engine = model.open(&options());
    let Chain { paths, tokens, _folder } = chain(&mut engine, "qwen3_next");
    let bytes = fs::metadata(&paths[1]).unwrap().len();
    let expected = SegmentInfo {
        binding: engine.binding(),
        forgets: true,
        start: 64,
        position: 200,
        before: PrefixHash::of(&tokens[..64]),
        text: PrefixHash::of(&tokens[..200]),
        tokens: tokens[64..200].to_vec(),
        marks: vec![70, 150],
        bytes,
    };
    assert_eq!(peek(&paths[1]).unwrap(), expected);
    assert_eq!(PrefixHash::of(&tokens[..64]).then(&tokens[64..200]), expected.text);
    let pages: Vec<_> = PrefixHash::default().pages(&tokens).collect();
    assert_eq!((pages.len(), pages[0]), (250 / PAGE_TOKENS, expected.before));
    let sequence = engine.new_sequence();
    for start in [64, 1] {
        let error = sequence.save_file_from(Path::new("nowhere"), start);
        assert!(matches!(error, Err(SessionError::Start { position: 0, .. })), "{error:?}");
    }
    let mut cut = fs::read(&paths[1]).unwrap();
    cut.pop();
    fs::write(&paths[1], &cut).unwrap();
    assert!(matches!(peek(&paths[1]), Err(SessionError::Truncated { .. })));
    cut.extend([0, 0]);
    fs::write(&paths[1], &cut).unwrap();
    assert!(matches!(peek(&paths[1]), Err(SessionError::Misplaced { .. })));
}

/// Damage in any part of a segment that is read never goes unnoticed, and leaves nothing in memory.
#[test]
fn damage_in_a_chain_is_found() {
    for family in ["deepseek_v3", "qwen3_next"] {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&options());
        let Chain { paths, tokens, _folder } = chain(&mut engine, family);
        let sound = fs::read(&paths[1]).unwrap();
        let length = sound.len();
        let mut refused = 0;
        for at in (0..length).step_by(length / 150) {
            let mut bytes = sound.clone();
            bytes[at] ^= 4;
            fs::write(&paths[1], &bytes).unwrap();
            match engine.restore_segments(&mut open(&paths[..2]), &tokens[..200]) {
                Err(SessionError::Damaged { path, .. } | SessionError::Misplaced { path, .. }) => {
                    assert_eq!(path, paths[1]);
                    refused += 1;
                }
                Err(SessionError::NotASession { .. } | SessionError::Version { .. } | SessionError::Foreign { .. }) => {
                    assert!(at < 32);
                    refused += 1;
                }
                // The data of a mark is not read on the way to the end.
                Ok(back) => assert_eq!((family, back.tokens()), ("qwen3_next", &tokens[..200])),
                Err(other) => panic!("{family} at {at}: {other}"),
            }
            assert!(engine.pages().iter().all(|pages| pages.free == pages.total));
        }
        assert!(refused > 50, "{family}: {refused}");
        for at in (0..length).step_by(length / 40) {
            fs::write(&paths[1], &sound[..at]).unwrap();
            assert!(engine.restore_segments(&mut open(&paths[..2]), &tokens[..200]).is_err());
        }
    }
}

/// Bytes of the header.
const HEADER_LEN: usize = 128;

/// Begin and end of every complete section, as `docs/SESSIONS.md` describes them.
fn sections(bytes: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let (mut sections, mut at) = (Vec::new(), HEADER_LEN);
    while at + 40 <= bytes.len() {
        let len = number(at + 16).checked_mul(number(at + 24)).and_then(|len| len.checked_add(at + 40));
        let Some(end) = len.filter(|&end| end <= bytes.len()) else { break };
        sections.push((at, end));
        at = end;
    }
    sections
}

/// Corrects all checksums and the hash of the text.
fn seal(bytes: &mut [u8]) {
    let sections = sections(bytes);
    if let Some(&(begin, end)) = sections.first() {
        let ids = bytes[begin + 32..end - 8].as_chunks::<4>().0.iter();
        let ids: Vec<u32> = ids.map(|&id| u32::from_le_bytes(id)).collect();
        let before = PrefixHash(u128::from_le_bytes(bytes[80..96].try_into().unwrap()));
        bytes[96..112].copy_from_slice(&before.then(&ids).0.to_le_bytes());
    }
    let seed = xxh3_64(&bytes[..HEADER_LEN - 8]);
    bytes[HEADER_LEN - 8..HEADER_LEN].copy_from_slice(&seed.to_le_bytes());
    for (begin, end) in sections {
        let sum = xxh3_64_with_seed(&bytes[begin..end - 8], seed);
        bytes[end - 8..end].copy_from_slice(&sum.to_le_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Checksums find damage, not forgery: whatever a file with right checksums contains, nothing panics, and no page is lost.
    #[test]
    fn forged_segments_harm_nothing(
        changes in prop::collection::vec((0..60_usize, 0..16_usize, 0..9_usize), 1..4),
        is_second in any::<bool>(),
    ) {
        FORGERS.with_borrow_mut(|forgers| {
            if forgers.is_empty() {
                forgers.extend(["qwen3_next", "deepseek_v32"].map(|family| {
                    let model = Converted::new(&format!("golden/{family}"), None);
                    let mut engine = model.open(&options());
                    let chain = chain(&mut engine, family);
                    (model, engine, chain)
                }));
            }
            for (_, engine, chain) in forgers {
                let which = usize::from(is_second);
                let sound = fs::read(&chain.paths[which]).unwrap();
                let mut forged = sound.clone();
                let parts = sections(&sound);
                for &(part, field, value) in &changes {
                    // The header as often as any section; and in a section, a number as often as its first fields.
                    let (at, len) = match part % (parts.len() + 1) {
                        0 => (HEADER_FIELDS[field].offset, HEADER_FIELDS[field].len.min(8)),
                        i if field % 2 == 0 => {
                            let field = &SECTION_FIELDS[field / 2 % 5];
                            (parts[i - 1].0 + field.offset, field.len)
                        }
                        i => ((parts[i - 1].0 + 32 + 4 * value).min(sound.len() - 8), 4),
                    };
                    let mut old = [0; 8];
                    old[..len].copy_from_slice(&forged[at..at + len]);
                    let old = u64::from_le_bytes(old);
                    let values = [0, 1, old.wrapping_add(1), old.wrapping_sub(1), old.wrapping_add(64), old.wrapping_sub(64), 1 << 26, 1 << 40, u64::MAX];
                    forged[at..at + len].copy_from_slice(&values[value].to_le_bytes()[..len]);
                }
                seal(&mut forged);
                fs::write(&chain.paths[which], &forged).unwrap();
                let _: Result<_, _> = peek(&chain.paths[which]);
                if let Ok(mut back) = engine.restore_segments(&mut open(&chain.paths), &chain.tokens) {
                    assert!(chain.tokens.starts_with(back.tokens()));
                    let _: Result<(), _> = engine.forward(&mut back, &[1], &mut Vec::new());
                }
                if let Ok(mut back) = engine.restore_file(&chain.paths[0]) {
                    let before = back.tokens().to_vec();
                    match engine.restore_onto(&mut back, &chain.paths[1]) {
                        Ok(()) => assert!(back.position() >= 64),
                        Err(_) => assert_eq!(back.tokens(), before),
                    }
                    let _: Result<(), _> = engine.forward(&mut back, &[1], &mut Vec::new());
                }
                fs::write(&chain.paths[which], &sound).unwrap();
                assert!(engine.pages().iter().all(|pages| pages.free == pages.total));
            }
        });
    }
}

thread_local! {
    /// Models, engines and chains whose segments are forged.
    static FORGERS: RefCell<Vec<(Converted, Engine, Chain)>> = const { RefCell::new(Vec::new()) };
}

/// A prefix is read without the rest of its segment.
#[test]
fn the_beginning_of_a_long_segment_is_read_alone() {
    let model = Converted::new("demo-model", None);
    let mut engine = model.open(&EngineOptions { context: Some(512), ..options() });
    let tokens: Vec<u32> = (0..512).map(|i| (i * 37 + 11) % 1500).collect();
    let mut sequence = engine.new_sequence();
    read(&mut engine, &mut sequence, &tokens);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long");
    sequence.save_file(&path).unwrap();
    let sound = fs::read(&path).unwrap();
    let mut saved = Vec::new();
    for (wanted, damaged_at, is_read) in [(512, 200, true), (257, 200, true), (256, 200, false), (100, 200, false)] {
        let mut bytes = sound.clone();
        let at = bytes.len() - damaged_at;
        bytes[at] ^= 1;
        for (damaged, bytes) in [(false, &sound), (true, &bytes)] {
            fs::write(&path, bytes).unwrap();
            match engine.restore_segments(&mut open(std::slice::from_ref(&path)), &tokens[..wanted]) {
                Err(SessionError::Damaged { .. }) => assert!(damaged && is_read, "{wanted}"),
                Err(other) => panic!("{wanted}: {other}"),
                Ok(back) => {
                    assert!(!damaged || !is_read, "{wanted}");
                    let mut beginning = sequence.fork();
                    beginning.rewind_to(wanted).unwrap();
                    let mut want = Vec::new();
                    saved.clear();
                    back.save(&mut saved).unwrap();
                    beginning.save(&mut want).unwrap();
                    assert!(saved == want, "{wanted}");
                }
            }
        }
    }
}

/// Pages are copied on write, so a fork can be saved while the engine continues with the original.
#[test]
fn a_fork_is_saved_on_another_thread() {
    fn is_send<T: Send + Sync>() {}
    is_send::<Sequence>();
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&options());
        let (mut sequence, tokens) = (engine.new_sequence(), tokens(family, 250));
        read(&mut engine, &mut sequence, &tokens[..100]);
        let mut want = Vec::new();
        sequence.save(&mut want).unwrap();
        std::thread::scope(|scope| {
            for step in 0..20 {
                let fork = sequence.fork();
                let at = fork.position();
                let saving = scope.spawn(move || {
                    let mut saved = Vec::new();
                    fork.save(&mut saved).unwrap();
                    saved
                });
                read(&mut engine, &mut sequence, &tokens[at..at + 3]);
                let saved = saving.join().unwrap();
                assert!(step > 0 || saved == want, "{family}");
                let back = engine.restore(&mut &saved[..], Path::new("fork")).unwrap();
                assert_eq!(back.tokens(), &tokens[..at]);
                let mut again = Vec::new();
                back.save(&mut again).unwrap();
                assert!(again == saved, "{family}: what was saved beside step {step} is not whole");
            }
        });
    }
}
