//! Each rule finds what it forbids in a few lines that break it, and nothing in lines that do not.

use crate::complaints;
use crate::rules::{ANY, FILE_LINES, FUNCTION_LINES, RULES, Rule};
use crate::source::{Source, mark_test_modules};

fn rule(name: &str) -> &'static Rule {
    RULES.iter().find(|rule| rule.name == name).unwrap_or_else(|| panic!("there is no rule {name}"))
}

/// Lines of a source to which a rule objects.
fn lines(name: &str, path: &str, text: &str) -> Vec<usize> {
    let mut lines: Vec<usize> = (rule(name).check)(&Source::new(path, text)).iter().map(|f| f.line).collect();
    lines.sort_unstable();
    lines
}

/// `lines` lines; the first one opens a function.
fn function(lines: usize) -> String {
    format!("fn long() {{\n{}}}\n", "    step();\n".repeat(lines - 2))
}

#[test]
fn every_rule_has_a_sample() {
    let samples = include_str!("samples.rs");
    for rule in RULES {
        assert!(samples.contains(&format!("lines({:?}", rule.name)), "no test here breaks the rule {:?}", rule.name);
    }
}

#[test]
fn long_files_and_functions() {
    let steps = |n| "mod a;\n".repeat(n);
    assert_eq!(lines("length of files", "format/src/a.rs", &steps(FILE_LINES)), []);
    assert_eq!(lines("length of files", "format/src/a.rs", &steps(FILE_LINES + 1)), [FILE_LINES + 1]);
    assert_eq!(lines("length of files", "docs/A.md", &steps(FILE_LINES + 1)), []);

    assert_eq!(lines("length of functions", "format/src/a.rs", &function(FUNCTION_LINES)), []);
    assert_eq!(lines("length of functions", "format/src/a.rs", &function(FUNCTION_LINES + 1)), [1]);
    let within = format!("mod a {{ impl A {{\n{}}} }}", function(FUNCTION_LINES + 1));
    assert_eq!(lines("length of functions", "format/tests/a.rs", &within), [2]);
    let within = format!("trait A {{\n/// Says more.\n{}}}", function(FUNCTION_LINES + 1));
    assert_eq!(lines("length of functions", "format/src/a.rs", &within), [3]);
}

#[test]
fn unfinished_code() {
    let text = "fn a() { todo!() }\nfn b() { assert!(dbg!(1) == 1); }\nfn c() { unimplemented!(\"later\") }\n";
    assert_eq!(lines("unfinished code", "cli/tests/a.rs", text), [1, 2, 3]);
    let mark = concat!("// TO", "DO: more\nfn a() {} // FIX", "ME\n");
    assert_eq!(lines("unfinished code", "cli/src/a.rs", mark), [1, 2]);
    assert_eq!(lines("unfinished code", "cli/src/a.rs", "let_us!(todo);\n// What is left to do: nothing.\n"), []);
    assert_eq!(lines("unfinished code", "cli/src/a.rs", "/// Calls `todo!()`.\nfn a() { b(\"dbg!(1)\") }"), []);
}

#[test]
fn printing() {
    let text =
        "fn a() { println!(\"a\"); eprint!(\"a\"); }\n#[cfg(test)]\nmod tests {\n fn b() { println!(\"b\"); }\n}\n";
    assert_eq!(lines("printing", "format/src/a.rs", text), [1, 1]);
    assert_eq!(lines("printing", "cli/src/a.rs", text), []);
    assert_eq!(lines("printing", "format/tests/a.rs", text), []);
}

#[test]
fn exit() {
    let text =
        "use std::process;\nfn a() { std::process::exit(1) }\nfn b() { process::abort() }\nfn c() { d.exit() }\n";
    assert_eq!(lines("exit", "cli/src/a.rs", text), [2, 3]);
    assert_eq!(lines("exit", "cli/src/main.rs", text), []);
}

#[test]
fn unwrap() {
    let text = "fn a() { b().unwrap(); }\nfn c() { vec![d.unwrap()]; }\nfn e() { f.expect(\"\"); f.expect(\"why\"); }\n\
                fn g() { h.unwrap_or(1); }\n#[test]\nfn i() { j.unwrap(); }\n#[cfg(test)]\nimpl K { fn l() { m.unwrap(); } }\n";
    assert_eq!(lines("unwrap", "format/src/a.rs", text), [1, 2, 3]);
    assert_eq!(lines("unwrap", "format/examples/a.rs", text), []);
}

#[test]
fn modules_of_tests() {
    let mut sources = [
        Source::new("text/src/lib.rs", "#[cfg(test)]\nmod samples;\nmod other;\n#[cfg(unix)]\nmod third;\n"),
        Source::new("text/src/samples.rs", ""),
        Source::new("text/src/samples/more.rs", ""),
        Source::new("text/src/samples_2.rs", ""),
        Source::new("text/src/other.rs", "#[cfg(test)]\nmod tests;\n"),
        Source::new("text/src/other/tests.rs", ""),
        Source::new("text/src/third.rs", ""),
    ];
    mark_test_modules(&mut sources);
    let are_tests: Vec<bool> = sources.iter().map(|source| source.is_test).collect();
    assert_eq!(are_tests, [false, true, true, false, false, true, false]);
}

#[test]
fn unsafe_code() {
    let text = "#![deny(unsafe_op_in_unsafe_fn)]\n// unsafe\nfn a() { unsafe { b() } }\nunsafe impl Send for C {}\n\
                macro_rules! d { () => { unsafe { e() } } }\n";
    assert_eq!(lines("unsafe", "format/src/a.rs", text), [3, 4, 5]);
}

#[test]
fn ignored_tests() {
    let text = "#[test]\n#[ignore]\nfn a() {}\n#[test]\n#[ignore = \"slow\"]\nfn b() {}\nfn ignore() {}\n";
    assert_eq!(lines("ignored tests", "format/tests/a.rs", text), [2, 5]);
}

#[test]
fn too_many_arguments() {
    let text = "#[expect(clippy::too_many_arguments, reason = \"a\")]\nfn a() {}\n#[expect(clippy::mut_from_ref)]\nfn b() {}\n";
    assert_eq!(lines("too many arguments", "format/src/a.rs", text), [1]);
}

#[test]
fn words() {
    let text = "/// Reads on a guess.\nfn look_ahead() {}\nstruct Foresight;\nfn ahead() { look(\"at this\") }\nfn prefetch() {}\n";
    assert_eq!(lines("word: prefetch", "runtime/model/src/a.rs", text), [1, 2, 3]);
    assert_eq!(lines("word: prefetch", "docs/A.md", "Wrong guesses\ncost a read.\n"), [1]);

    let text = "fn a(b: &[u8]) { b.chunks(2); b.first_chunk::<2>(); b.utf8_chunks(); }\n/// A chunk.\nfn c() {}\nlet_us!(chunk_len);\n";
    assert_eq!(lines("word: chunk", "kernels/src/a.rs", text), [2, 4]);
    assert_eq!(lines("word: chunk", "runtime/storage/src/a.rs", text), []);

    assert_eq!(lines("word: filesystem", "docs/A.md", "File systems,\nfilesystems,\nthe file, systematically\n"), [1]);
    assert_eq!(
        lines("word: model file", "format/src/a.rs", "// weight files\n// model files\n// of weights: files\n"),
        [1]
    );
}

/// The complaints about a file with three findings, with an exception for so many.
fn complaints_with(allowed: usize, text: &str) -> Vec<String> {
    complaints(rule("unsafe"), &[("a.rs", allowed)], &[Source::new("a.rs", text)])
}

#[test]
fn exceptions_only_shrink() {
    let three = "unsafe fn a() {}\nunsafe fn b() {}\n\nunsafe fn c() {}\n";
    assert!(complaints_with(3, three).is_empty() && complaints_with(ANY, three).is_empty());

    let more = complaints_with(2, three);
    assert_eq!(more.len(), 3);
    assert!(more[2].starts_with("a.rs:4: `unsafe` (3 here, 2 known): "), "{}", more[2]);
    assert!(more[2].ends_with(rule("unsafe").remedy), "{}", more[2]);
    assert_eq!(complaints_with(4, three), ["a.rs: exception to \"unsafe\" in rules.rs: write 3"]);
    for allowed in [4, ANY] {
        assert_eq!(complaints_with(allowed, ""), ["a.rs: exception to \"unsafe\" in rules.rs: take it out"]);
    }
    let gone = complaints(rule("unsafe"), &[("b.rs", ANY)], &[Source::new("a.rs", "")]);
    assert_eq!(gone, ["b.rs: no such file: take out its exception to \"unsafe\""]);
}
