//! The rules. Each says what it finds, how to fix it, and which files have which exceptions.

use crate::source::{Source, Token};
use crate::words::mentions;

/// A place to which a rule objects.
pub(crate) struct Finding {
    pub(crate) line: usize,
    pub(crate) what: String,
}

/// A rule and its exceptions.
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) remedy: &'static str,
    pub(crate) check: fn(&Source) -> Vec<Finding>,
    /// Files with known findings, and how many they may have, or [`ANY`]. The numbers may only shrink: exceptions that are no
    /// longer needed fail the test too.
    pub(crate) exceptions: &'static [(&'static str, usize)],
}

/// Any number of findings. A file that has none left must lose its exception.
pub(crate) const ANY: usize = usize::MAX;

/// Most lines of a file.
pub(crate) const FILE_LINES: usize = 800;
/// Most lines of a function.
pub(crate) const FUNCTION_LINES: usize = 70;

pub(crate) const RULES: &[Rule] = &[
    Rule {
        name: "length of files",
        remedy: "split the file by what its parts are about",
        check: long_files,
        exceptions: &[],
    },
    Rule {
        name: "length of functions",
        remedy: "give its parts names, as functions of their own",
        check: long_functions,
        exceptions: &[],
    },
    Rule {
        name: "unfinished code",
        remedy: "finish it, or leave it out and say so in an issue",
        check: unfinished,
        exceptions: &[],
    },
    Rule {
        name: "printing",
        remedy: "return what is to be said: only `cli` and the fuzzer write to the terminal",
        check: printing,
        exceptions: &[],
    },
    Rule {
        name: "exit",
        remedy: "return an error, or an exit code to `main`: whoever exits elsewhere leaves files half written",
        check: exits,
        exceptions: &[],
    },
    Rule {
        name: "unwrap",
        remedy: "return a typed error; if it cannot happen, say why not: `expect(\"...\")`",
        check: unwraps,
        exceptions: &[],
    },
    Rule {
        name: "unsafe",
        remedy: "use what the files that have `unsafe` offer, or show in review what a safe version costs and add the file here",
        check: unsafe_code,
        exceptions: UNSAFE_FILES,
    },
    Rule {
        name: "ignored tests",
        remedy: "run it, make it faster, or delete it: what never runs proves nothing",
        check: ignored_tests,
        // One writes the golden file of a new version; the other is started by a test with its own environment.
        exceptions: &[("format/tests/golden.rs", 1), ("kernels/src/isa.rs", 1)],
    },
    Rule {
        name: "too many arguments",
        remedy: "group what belongs together into a type",
        check: too_many_arguments,
        exceptions: &[],
    },
    Rule {
        name: "word: prefetch",
        remedy: "a read before the router has asked is a prefetch",
        check: |source| words(source, &[&["guess*"], &["foresight"], &["look*", "ahead"], &["lookahead"]]),
        exceptions: &[],
    },
    Rule {
        name: "word: chunk",
        remedy: "a chunk is what one read brings; other parts are a block, a piece, a span or rows",
        check: chunks,
        exceptions: &[],
    },
    Rule {
        name: "word: filesystem",
        remedy: "write filesystem, in one word",
        check: |source| words(source, &[&["file", "system*"]]),
        exceptions: &[],
    },
    Rule {
        name: "word: model file",
        remedy: "what `convert` writes is a model file",
        check: |source| words(source, &[&["weight", "file*"], &["weights", "file*"]]),
        exceptions: &[],
    },
];

/// Files with `unsafe`: kernels, checksums and their memory, I/O and its memory, and tests that look at memory from outside.
const UNSAFE_FILES: &[(&str, usize)] = &[
    ("checksum/src/avx2.rs", ANY),
    ("checksum/src/neon.rs", ANY),
    ("cli/tests/common/pty.rs", ANY),
    ("cli/tests/optional.rs", ANY),
    ("fuzz/src/limits.rs", ANY),
    ("kernels/src/neon/int8.rs", ANY),
    ("kernels/src/neon/mod.rs", ANY),
    ("kernels/src/par_slice.rs", ANY),
    ("kernels/src/threads.rs", ANY),
    ("kernels/src/x86/avx2.rs", ANY),
    ("kernels/src/x86/avx2/attention.rs", ANY),
    ("kernels/src/x86/avx2/grouped/grids.rs", ANY),
    ("kernels/src/x86/avx2/vnni.rs", ANY),
    ("kernels/src/x86/avx512.rs", ANY),
    ("kernels/src/x86/avx512/attention.rs", ANY),
    ("kernels/src/x86/avx512/grouped/grids.rs", ANY),
    ("kernels/tests/guard_pages.rs", ANY),
    ("runtime/model/tests/allocations.rs", ANY),
    ("runtime/storage/src/io/arena.rs", ANY),
    ("runtime/storage/src/io/fill.rs", ANY),
    ("runtime/storage/src/io/sys.rs", ANY),
    ("runtime/storage/src/io/uring.rs", ANY),
];

fn long_files(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().count();
    if !source.is_rust() || lines <= FILE_LINES {
        return Vec::new();
    }
    vec![Finding { line: lines, what: format!("{lines} lines, {FILE_LINES} at most") }]
}

fn long_functions(source: &Source) -> Vec<Finding> {
    let long = source.functions.iter().filter(|f| f.lines > FUNCTION_LINES);
    let what = |lines, name: &str| format!("`{name}` has {lines} lines, {FUNCTION_LINES} at most");
    long.map(|f| Finding { line: f.line, what: what(f.lines, &f.name) }).collect()
}

fn unfinished(source: &Source) -> Vec<Finding> {
    let mut found = tokens(source, &[&["todo", "!"], &["unimplemented", "!"], &["dbg", "!"]]);
    // In two parts, because this file is checked too.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    for (line, text) in source.lines().filter(|_| source.is_rust()) {
        let comment = text.split_once("//").map_or("", |(_, comment)| comment).trim_start_matches(['/', '!', ' ']);
        found.extend(marks.iter().filter(|&&mark| comment.starts_with(mark)).map(|mark| finding(line, mark)));
    }
    found
}

fn printing(source: &Source) -> Vec<Finding> {
    if source.path.starts_with("cli/") || source.path.starts_with("fuzz/") {
        return Vec::new();
    }
    outside_tests(source, &[&["println", "!"], &["print", "!"], &["eprintln", "!"], &["eprint", "!"]])
}

fn exits(source: &Source) -> Vec<Finding> {
    // A fuzzer reports what it has found by panicking.
    if source.path.ends_with("/main.rs") || source.path.starts_with("fuzz/") {
        return Vec::new();
    }
    tokens(source, &[&["process", ":", ":", "exit"], &["process", ":", ":", "abort"]])
}

fn unwraps(source: &Source) -> Vec<Finding> {
    outside_tests(source, &[&[".", "unwrap", "(", ")"], &[".", "unwrap_err", "(", ")"], &[".", "expect", "(", "\"\""]])
}

fn unsafe_code(source: &Source) -> Vec<Finding> {
    tokens(source, &[&["unsafe"]])
}

fn ignored_tests(source: &Source) -> Vec<Finding> {
    tokens(source, &[&["#", "[", "ignore"]])
}

fn too_many_arguments(source: &Source) -> Vec<Finding> {
    tokens(source, &[&["clippy", ":", ":", "too_many_arguments"]])
}

/// Crates that do not read from a drive while a model runs.
const WITHOUT_READS: [&str; 6] =
    ["checksum/src/", "format/src/", "kernels/src/", "converter/src/", "runtime/text/src/", "runtime/generate/src/"];

fn chunks(source: &Source) -> Vec<Finding> {
    if !WITHOUT_READS.iter().any(|folder| source.path.starts_with(folder)) {
        return Vec::new();
    }
    let ours = |token: &&Token| mentions(&token.text, &["chunk*"]) && !is_called_so_elsewhere(&token.text);
    source.tokens.iter().filter(ours).map(|token| finding(token.line, &token.text)).collect()
}

/// What the standard library calls a chunk keeps that name, and so do keys and values of configurations.
fn is_called_so_elsewhere(name: &str) -> bool {
    const OF_CONFIGURATIONS: [&str; 2] = ["\"attention_chunk_size\"", "\"chunked_attention\""];
    const NAMES: [&str; 4] = ["chunk_by", "chunks", "utf8_chunks", "ChunksExact"];
    const STARTS: [&str; 6] =
        ["chunks_", "as_chunks", "first_chunk", "last_chunk", "split_first_chunk", "split_last_chunk"];
    OF_CONFIGURATIONS.contains(&name) || NAMES.contains(&name) || STARTS.iter().any(|start| name.starts_with(start))
}

fn finding(line: usize, what: &str) -> Finding {
    Finding { line, what: format!("`{what}`") }
}

/// Places where one of the sequences of tokens occurs.
fn tokens(source: &Source, sequences: &[&[&str]]) -> Vec<Finding> {
    let mut found = Vec::new();
    for sequence in sequences {
        found.extend(source.find(sequence).map(|line| finding(line, &sequence.concat())));
    }
    found
}

fn outside_tests(source: &Source, sequences: &[&[&str]]) -> Vec<Finding> {
    let mut found = tokens(source, sequences);
    found.retain(|f| !source.tests(f.line));
    found
}

/// Lines with one of the phrases, in code, comments or prose.
fn words(source: &Source, phrases: &[&[&str]]) -> Vec<Finding> {
    // The rules themselves have to name what they forbid.
    if source.path.starts_with("tests/tests/tidy/") {
        return Vec::new();
    }
    let has = |text: &str| phrases.iter().any(|phrase| mentions(text, phrase));
    source.lines().filter(|(_, text)| has(text)).map(|(line, text)| finding(line, text.trim())).collect()
}
