//! Saved sequences: they continue with the same bits, and damaged or foreign files are not accepted.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use sluice_model::session::{
    HEADER_FIELDS, SECTION_FIELDS, SECTION_KINDS, SESSION_MAGIC, SESSION_VERSION, SessionError, kv_code,
};
use sluice_model::{Engine, EngineOptions, KvType, Sequence};
use sluice_tests::{ATTENTIONS, Converted, Golden, forgets};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

const HEADER_LEN: usize = 128;

fn options(kv_type: KvType) -> EngineOptions {
    EngineOptions { context: Some(64), sequences: Some(4), kv_type, forget: true, ..EngineOptions::default() }
}

/// The tokens of a family: those of its golden prompt, there and back.
fn tokens(family: &str) -> Vec<u32> {
    let ids = Golden::load(family).ids("input_ids");
    ids.iter().chain(ids.iter().rev()).copied().cycle().take(40).collect()
}

fn logits(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    engine.forward_all(sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
    all
}

fn saved(sequence: &Sequence) -> Vec<u8> {
    let mut bytes = Vec::new();
    sequence.save(&mut bytes).unwrap();
    bytes
}

fn restored(engine: &Engine, bytes: &[u8]) -> Result<Sequence, SessionError> {
    engine.restore(&mut &bytes[..], Path::new("the-session"))
}

/// Begin and end of every section, as `docs/SESSIONS.md` describes them.
fn sections(bytes: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let (mut sections, mut at) = (Vec::new(), HEADER_LEN);
    while at < bytes.len() {
        let end = at + 32 + number(at + 16) * number(at + 24) + 8;
        sections.push((at, end));
        at = end;
    }
    sections
}

/// Corrects all checksums.
fn seal(bytes: &mut [u8]) {
    let seed = xxh3_64(&bytes[..HEADER_LEN - 8]);
    bytes[HEADER_LEN - 8..HEADER_LEN].copy_from_slice(&seed.to_le_bytes());
    for (begin, end) in sections(bytes) {
        let sum = xxh3_64_with_seed(&bytes[begin..end - 8], seed);
        bytes[end - 8..end].copy_from_slice(&sum.to_le_bytes());
    }
}

#[test]
fn a_restored_sequence_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for family in ATTENTIONS {
        let (model, tokens) = (Converted::new(&format!("golden/{family}"), None), tokens(family));
        for kv_type in KvType::ALL {
            let mut engine = model.open(&options(kv_type));
            // Another engine with other room: a restored sequence does not depend on how it lay in memory.
            let mut other =
                model.open(&EngineOptions { context: Some(50), threads: Some(1), marks: 1, ..options(kv_type) });
            let mut alone = engine.new_sequence();
            let want = logits(&mut engine, &mut alone, &tokens);
            let vocab = want.len() / tokens.len();
            for at in [0, 1, 13, 29] {
                let (mut sequence, path) = (engine.new_sequence(), folder.path().join("session"));
                if at > 0 {
                    logits(&mut engine, &mut sequence, &tokens[..at]);
                }
                sequence.save_file(&path).unwrap();
                let mut back = other.restore_file(&path).unwrap();
                assert_eq!((back.tokens(), back.capacity()), (&tokens[..at], other.memory().context));
                assert!(
                    saved(&back) == fs::read(&path).unwrap(),
                    "{family} {kv_type}: saved again, it is another file"
                );
                let mark = back.mark().unwrap();
                for _ in 0..2 {
                    let rest = logits(&mut other, &mut back, &tokens[at..]);
                    assert!(rest == want[at * vocab..], "{family} {kv_type}: other bits after {at} tokens");
                    back.rewind(mark).unwrap();
                }
                // Wherever it goes back to, everything it needs is there.
                let mut fork = back.fork();
                let reached = fork.rewind_to(at / 2).unwrap();
                assert!(logits(&mut other, &mut fork, &tokens[reached..]) == want[reached * vocab..]);
            }
        }
    }
}

#[test]
fn marks_are_saved_with_what_they_keep() {
    for family in ATTENTIONS {
        let (model, tokens) = (Converted::new(&format!("golden/{family}"), None), tokens(family));
        let tokens: Vec<u32> = tokens.iter().copied().cycle().take(200).collect();
        let open = |marks| {
            let options = EngineOptions { context: Some(200), marks, mark_every: Some(50), ..options(KvType::F16) };
            model.open(&options)
        };
        let (mut engine, mut few) = (open(5), open(2));
        let mut sequence = engine.new_sequence();
        let want = logits(&mut engine, &mut sequence, &tokens);
        let vocab = want.len() / tokens.len();
        sequence.clear();
        let marked = [0, 3, 90, 120];
        sequence.mark().unwrap();
        for part in marked.windows(2) {
            logits(&mut engine, &mut sequence, &tokens[part[0]..part[1]]);
            sequence.mark().unwrap();
        }
        logits(&mut engine, &mut sequence, &tokens[120..190]);
        let bytes = saved(&sequence);
        let mut back = restored(&engine, &bytes).unwrap();
        assert!(saved(&back) == bytes, "{family}: saved again, it is another file");
        let positions = |sequence: &Sequence| sequence.marks().map(|mark| mark.position()).collect::<Vec<_>>();
        assert_eq!(positions(&back), marked);
        let marks: Vec<_> = back.marks().collect();
        for mark in marks.into_iter().rev() {
            let at = mark.position();
            let mut fork = back.fork();
            fork.rewind(mark).unwrap();
            assert!(logits(&mut engine, &mut fork, &tokens[at..]) == want[at * vocab..], "{family} at {at}");
            drop(fork);
            back.rewind(mark).unwrap();
            assert!(logits(&mut engine, &mut back, &tokens[at..at + 1]) == want[at * vocab..][..vocab]);
        }
        // With room for fewer, the newest of those that take room stay.
        let mut back = restored(&few, &bytes).unwrap();
        let forgets = forgets(family);
        let stay = positions(&back);
        assert_eq!(stay, if forgets { &[0, 120][..] } else { &marked[..] }, "{family}");
        let last = back.marks().last().unwrap();
        back.rewind(last).unwrap();
        assert!(logits(&mut few, &mut back, &tokens[120..]) == want[120 * vocab..], "{family}");
    }
}

#[test]
fn the_file_is_what_its_description_says() {
    let model = Converted::new("golden/mixtral_swa", None);
    let mut engine = model.open(&options(KvType::Q8));
    let (mut sequence, tokens) = (engine.new_sequence(), tokens("mixtral_swa"));
    logits(&mut engine, &mut sequence, &tokens);
    let bytes = saved(&sequence);
    let mut sealed = bytes.clone();
    seal(&mut sealed);
    assert!(sealed == bytes, "checksums are as described");
    let sections = sections(&bytes);
    assert_eq!(sections.len(), 2 + engine.spec().layers.len());
    assert_eq!(sections.last().unwrap().1, bytes.len());
    assert_eq!(bytes[16..32], engine.file().state_id().0);
    assert_eq!(bytes[72..80], (bytes.len() as u64).to_le_bytes());
    let first = &bytes[sections[0].0 + 32..sections[0].1 - 8];
    assert!(first.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).eq(tokens.iter().copied()));
    for ((begin, _), layer) in sections[2..].iter().zip(&engine.spec().layers) {
        let sluice_format::AttentionSpec::Gqa(gqa) = &layer.attention else { panic!("all layers are alike") };
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let seen = gqa.window.map_or(tokens.len(), |window| (window - 1).min(tokens.len()));
        assert_eq!(number(begin + 8), tokens.len() - seen);
        assert_eq!(number(begin + 16), seen, "a window is kept, not everything");
        let row = |width: usize| width + 2 * width.div_ceil(32);
        assert_eq!(number(begin + 24), gqa.kv_heads * (row(gqa.head_dim) + row(gqa.v_head_dim)));
    }
}

/// Numbers from a seed.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }
}

#[test]
fn no_damage_goes_unnoticed() {
    let mut refused = 0;
    for (seed, family) in ATTENTIONS.into_iter().enumerate() {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&options(KvType::ALL[seed % 4]));
        let mut of = |turn: usize| {
            let (mut sequence, mut tokens) = (engine.new_sequence(), tokens(family));
            tokens.rotate_left(turn);
            logits(&mut engine, &mut sequence, &tokens[..20]);
            saved(&sequence)
        };
        let (sound, other) = (of(0), of(1));
        assert!(restored(&engine, &sound).is_ok());
        let (parts, mut rng) = (sections(&sound), Lcg(seed as u64));
        for case in 0..90 {
            let mut bytes = sound.clone();
            match case % 6 {
                // Every part equally often, however short it is.
                0 | 1 => {
                    let (begin, end) = [&[(0, HEADER_LEN)], &parts[..]].concat()[rng.below(parts.len() + 1)];
                    let at = begin + rng.below(end - begin);
                    bytes[at] ^= 1 << rng.below(8);
                }
                2 => bytes.truncate(rng.below(sound.len())),
                3 => {
                    // Two sections are exchanged.
                    let (a, b) = (rng.below(parts.len()), rng.below(parts.len() - 1));
                    let b = if b >= a { b + 1 } else { b };
                    let ((a, a_end), (b, b_end)) = (parts[a.min(b)], parts[a.max(b)]);
                    bytes =
                        [&sound[..a], &sound[b..b_end], &sound[a_end..b], &sound[a..a_end], &sound[b_end..]].concat();
                }
                4 => {
                    // A section of another sequence of the same length.
                    let (begin, end) = parts[rng.below(parts.len())];
                    bytes[begin..end].copy_from_slice(&other[begin..end]);
                }
                _ => {
                    let at = rng.below(sound.len());
                    bytes.splice(at..at, std::iter::repeat_n(0, 1 + rng.below(40)));
                }
            }
            if bytes == sound {
                continue;
            }
            let error = restored(&engine, &bytes).map(|_| ()).expect_err(family).to_string();
            assert!(error.contains("the-session"), "{family}, case {case}: {error}");
            refused += 1;
        }
    }
    assert!(refused >= 590, "only {refused} of 630 changed anything");
}

/// Checksums find damage, not forgery: whatever numbers a file with right checksums contains, nothing panics.
#[test]
fn forged_numbers_harm_nothing() {
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        for kv_type in KvType::ALL {
            let mut engine = model.open(&options(kv_type));
            let (mut sequence, tokens) = (engine.new_sequence(), tokens(family));
            logits(&mut engine, &mut sequence, &tokens[..20]);
            let sound = saved(&sequence);
            let mut rng = Lcg(kv_type as u64);
            for (begin, end) in sections(&sound).into_iter().skip(1) {
                for fill in [[0xff; 4], [0, 0, 0x80, 0x7f], [0xff, 0xff, 0x7f, 0xff], [0; 4]] {
                    let mut forged = sound.clone();
                    let numbers = forged[begin + 32..end - 8].chunks_exact_mut(4);
                    numbers.filter(|_| rng.below(3) == 0).for_each(|number| number.copy_from_slice(&fill));
                    seal(&mut forged);
                    let mut back = restored(&engine, &forged).expect("its sums are right");
                    let _: Result<(), _> = engine.forward(&mut back, &tokens[20..23], &mut Vec::new());
                }
            }
        }
    }
}

#[test]
fn what_is_sound_and_does_not_fit_is_refused_by_name() {
    let (model, foreign) = (Converted::new("golden/gpt_oss", None), Converted::new("golden/mixtral_swa", None));
    let mut engine = model.open(&options(KvType::F32));
    let (mut sequence, tokens) = (engine.new_sequence(), tokens("gpt_oss"));
    logits(&mut engine, &mut sequence, &tokens);
    let sound = saved(&sequence);
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = sound.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        seal(&mut bytes);
        restored(&engine, &bytes).map(drop).unwrap_err()
    };
    let open = |options| model.open(&options);
    let narrow = open(options(KvType::Q8));
    let exact = open(EngineOptions { exact: true, ..options(KvType::F32) });
    let short = open(EngineOptions { context: Some(39), ..options(KvType::F32) });
    let refused = |engine: &Engine| restored(engine, &sound).map(drop).unwrap_err();
    assert!(matches!(refused(&foreign.open(&options(KvType::F32))), SessionError::Foreign { .. }));
    assert!(matches!(refused(&narrow), SessionError::KvType { wanted: KvType::Q8, found, .. } if found == "f32"));
    assert!(matches!(refused(&exact), SessionError::Precision { exact: false, .. }));
    assert!(matches!(refused(&short), SessionError::TooLong { position: 40, capacity: 39, .. }));
    for version in [1, 2, 3, 5] {
        assert!(matches!(changed(8, &[version]), SessionError::Version { found, .. } if found == u32::from(version)));
    }
    assert!(matches!(changed(12, &[0]), SessionError::Numerics { found: 0, .. }));
    assert!(matches!(changed(32, &[9]), SessionError::KvType { found, .. } if found == "type 9"));
    for (at, words) in [(112, "up to 0.09 %"), (114, "at most 9 experts")] {
        assert!(matches!(changed(at, &[9]), SessionError::Thrift { found, .. } if found.contains(words)));
    }
    assert!(matches!(changed(112, &[0xff; 2]), SessionError::Thrift { found, .. } if found.contains("not known")));
    for (code, form) in [(1, "expanded"), (9, "form 9")] {
        assert!(matches!(changed(116, &[code]), SessionError::PromptAttention { found, .. } if found == form));
    }
    assert!(matches!(changed(36, &[77]), SessionError::Misplaced { .. }));
    assert!(matches!(changed(64, &[42]), SessionError::Misplaced { .. }));
    for wrong in [40, 44, 48, 72, 80, 96, 118] {
        assert!(matches!(changed(wrong, &[77]), SessionError::Misplaced { .. }), "byte {wrong}");
    }
    // A valid header of a segment that begins elsewhere.
    assert!(matches!(changed(48, &[64, 0, 0, 0, 0, 0, 0, 0, 100]), SessionError::TooLong { .. }));
    // A forged length is compared, never allocated.
    assert!(matches!(changed(56, &[0xff; 8]), SessionError::TooLong { position: u64::MAX, .. }));
    let token = (HEADER_LEN + 32 + 4 * 3) as u64;
    let error = changed(token as usize, &[0xff; 4]);
    assert!(matches!(error, SessionError::Token { offset, token: u32::MAX, .. } if offset == token), "{error}");
    let longer = [&sound[..], b"x"].concat();
    assert!(matches!(restored(&engine, &longer), Err(SessionError::Misplaced { .. })));
    assert!(matches!(restored(&engine, b"SLUSEQ"), Err(SessionError::NotASession { .. })));
    // A step also refuses a sequence from another engine.
    let mut strange = narrow.new_sequence();
    assert!(engine.decode(&mut strange, 1, &mut Vec::new()).is_err());
}

/// A drive that is full after some bytes.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        if taken == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_session_is_the_old_one_or_the_new_one() {
    let model = Converted::new("golden/qwen3_next", None);
    let mut engine = model.open(&options(KvType::F32));
    let (mut sequence, tokens) = (engine.new_sequence(), tokens("qwen3_next"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    logits(&mut engine, &mut sequence, &tokens[..7]);
    sequence.save_file(&path).unwrap();
    let old = fs::read(&path).unwrap();
    logits(&mut engine, &mut sequence, &tokens[7..20]);
    let new = saved(&sequence);
    for room in (0..new.len()).step_by(997) {
        assert_eq!(sequence.save(&mut Full(room)).unwrap_err().kind(), io::ErrorKind::StorageFull);
        // What a killed process leaves after saving there.
        let leftover = folder.path().join(format!("session.{}-0", std::process::id()));
        fs::write(&leftover, &new[..room]).unwrap();
        assert_eq!(engine.restore_file(&path).unwrap().position(), 7);
        assert!(engine.restore_file(&leftover).is_err());
    }
    assert!(fs::read(&path).unwrap() == old);
    sequence.save_file(&path).unwrap();
    assert!(fs::read(&path).unwrap() == new, "a leftover is in nobody's way");
    // Only sessions are replaced.
    let notes = folder.path().join("notes");
    fs::write(&notes, "notes").unwrap();
    assert!(matches!(sequence.save_file(&notes), Err(SessionError::Occupied { .. })));
    assert!(matches!(sequence.save_file(folder.path()), Err(SessionError::Occupied { .. })));
    assert_eq!(fs::read(&notes).unwrap(), b"notes");
    let missing = folder.path().join("missing/session");
    assert!(matches!(sequence.save_file(&missing), Err(SessionError::Save { .. })));
    assert!(matches!(engine.restore_file(&missing), Err(SessionError::Open { .. })));
}

/// Where the child saves; if it is not set, the process is not the child.
const CHILD: &str = "SLUICE_TEST_SESSION";
/// Which of its sequences it saves first.
const FIRST: &str = "SLUICE_TEST_FIRST";

/// The sequences that are saved alternately; they differ, so that a mixture of both would be found.
fn savings(model: &Path) -> (Engine, [Sequence; 2]) {
    let options = EngineOptions { marks: 2, ..options(KvType::F32) };
    let mut engine = Engine::open(model, &options).unwrap();
    let tokens = tokens("qwen3_next");
    let sequences = [&tokens[..40], &tokens[3..30]].map(|tokens| {
        let mut sequence = engine.new_sequence();
        logits(&mut engine, &mut sequence, &tokens[..7]);
        sequence.mark().unwrap();
        logits(&mut engine, &mut sequence, &tokens[7..]);
        sequence
    });
    (engine, sequences)
}

/// Not a test of its own: the process that the next test kills. It saves until then.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let path = Path::new(&path);
    let first = std::env::var(FIRST).unwrap().parse().unwrap();
    let (_engine, sequences) = savings(&path.with_file_name("model.sluice"));
    for sequence in sequences.iter().cycle().skip(first) {
        sequence.save_file(path).unwrap();
    }
}

#[test]
fn a_saving_that_is_killed_leaves_the_old_session_or_the_new_one() {
    let model = Converted::new("golden/qwen3_next", None);
    let (engine, sequences) = savings(&model.path);
    let wanted = sequences.each_ref().map(saved);
    let path = model.path.with_file_name("session");
    sequences[0].save_file(&path).unwrap();
    let (mut seen, mut leftovers, mut rng) = ([0; 2], 0, Lcg(7));
    let beside = || {
        let files = fs::read_dir(path.parent().unwrap()).unwrap();
        files.filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().starts_with("session.")).count()
    };
    for round in 0..25 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sessions::child"])
            .env(CHILD, &path)
            // On a drive that is slow to sync, most are killed during the second saving; then the first sequence is there.
            .env(FIRST, (round % 2).to_string())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // At any moment after it has begun to save.
        let first = fs::metadata(&path).unwrap().modified().unwrap();
        while fs::metadata(&path).unwrap().modified().unwrap() == first {
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.below(5000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        leftovers += beside();
        let bytes = fs::read(&path).unwrap();
        let which = wanted.iter().position(|wanted| *wanted == bytes).expect("the one or the other, whole");
        seen[which] += 1;
        let back = engine.restore_file(&path).unwrap();
        assert_eq!(back.tokens(), sequences[which].tokens());
        drop(back);
        sequences[1 - which].save_file(&path).unwrap();
        assert_eq!(beside(), 0, "what was left is removed");
    }
    assert!(seen.iter().all(|&n| n > 0), "{seen:?}");
    println!("{leftovers} of 25 were killed while they wrote");
}

/// The rows of the table that follows `*checked: NAME*`, the first `n` cells of each, without backticks.
fn table(name: &str, n: usize) -> Vec<String> {
    let text = include_str!("../../docs/SESSIONS.md");
    let after = text.split_once(&format!("*checked: {name}*")).unwrap_or_else(|| panic!("no table {name}")).1;
    let lines = after.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|')).skip(2);
    let cells = |l: &str| l[1..l.len() - 1].split('|').map(|c| c.trim().replace('`', "")).collect::<Vec<_>>();
    lines.map(|l| cells(l)[..n].join(" ")).collect()
}

#[test]
fn the_description_is_what_the_code_says() {
    for (name, fields) in [("header", &HEADER_FIELDS[..]), ("section", &SECTION_FIELDS[..])] {
        let code: Vec<_> = fields.iter().map(|f| format!("{} {} {}", f.offset, f.len, f.name)).collect();
        assert_eq!(table(name, 3), code, "{name}");
    }
    assert_eq!(table("kv_types", 2), KvType::ALL.map(|ty| format!("{} {}", kv_code(ty), ty.name())));
    let kinds = SECTION_KINDS.iter().enumerate().map(|(i, name)| format!("{} {name}", i + 1));
    assert_eq!(table("kinds", 2), kinds.collect::<Vec<_>>());
    assert_eq!(SESSION_MAGIC, *b"SLUSEQ\x0d\x1a");
    assert!(table("header", 4)[0].ends_with("SLUSEQ 0D 1A"));
    assert!(table("header", 4)[1].ends_with(&SESSION_VERSION.to_string()));
    assert!(
        include_str!("../../docs/SESSIONS.md").starts_with(&format!("# Saved sequences, version {SESSION_VERSION}\n"))
    );
}
