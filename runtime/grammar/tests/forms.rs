//! Every form, with every kind of tokenizer: the text has the form, and ends by itself.

use std::sync::Barrier;

use crate::common::{KINDS, Outcome, Random, published};
use serde_json::{Value, json};
use sluice_grammar::{Form, Grammar, GrammarError, lark_json};

#[test]
fn any_object_is_an_object_with_every_tokenizer() {
    for kind in KINDS {
        let (tokenizer, vocabulary) = published(kind);
        let random = Random::new(&tokenizer, &vocabulary);
        let grammar = Grammar::compile(&vocabulary, &Form::JsonObject).unwrap();
        for seed in 0..10 {
            let (_, outcome) = random.write(&grammar, seed, 300);
            let Outcome::Ended(text) = outcome else { panic!("{kind}, {seed}: {outcome:?}") };
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{kind}: {e} in {text:?}"));
            assert!(value.is_object());
        }
    }
}

#[test]
fn text_is_exactly_that_text() {
    for kind in KINDS {
        let (tokenizer, vocabulary) = published(kind);
        let random = Random::new(&tokenizer, &vocabulary);
        for text in ["hello", "a \"b\" /c/\n\\d\u{7f} 中🦀", "{}"] {
            let grammar = Grammar::compile(&vocabulary, &Form::Text(text.into())).unwrap();
            for seed in 0..3 {
                let (_, outcome) = random.write(&grammar, seed, 100);
                assert_eq!(outcome, Outcome::Ended(text.into()), "{kind}");
            }
        }
    }
}

#[test]
fn a_text_may_end_with_an_end_token() {
    let (tokenizer, vocabulary) = published("gpt_oss");
    let end = tokenizer.end_token().unwrap();
    let text = format!("a{}", tokenizer.token_text(end).unwrap());
    let grammar = Grammar::compile(&vocabulary, &Form::Text(text)).unwrap();
    let mut constraint = grammar.constraint();
    for id in [tokenizer.token_id("a").unwrap(), end] {
        assert!(!constraint.is_complete());
        let mut logits = vec![0.0; tokenizer.vocab_size()];
        constraint.mask(&mut logits);
        assert!(logits[id as usize].is_finite());
        assert_eq!(logits.iter().filter(|l| l.is_finite()).count(), 1);
        constraint.accept(id);
    }
    assert!(constraint.is_complete());
}

#[test]
fn one_of_several_texts_is_chosen() {
    let (tokenizer, vocabulary) = published("qwen2");
    let random = Random::new(&tokenizer, &vocabulary);
    let texts = ["yes", "no", "yes, but <|im_start|>"].map(str::to_owned).to_vec();
    let grammar = Grammar::compile(&vocabulary, &Form::Choice(texts.clone())).unwrap();
    for seed in 0..20 {
        let (ids, outcome) = random.write(&grammar, seed, 100);
        assert!(matches!(outcome, Outcome::Ended(text) if texts.contains(&text)));
        assert!(ids.iter().all(|&id| !tokenizer.is_special(id)));
    }
    assert!(Grammar::compile(&vocabulary, &Form::Choice(Vec::new())).is_err());
}

/// However many texts there are, a generation comes to the end of one of them.
#[test]
fn one_of_two_thousand_texts_is_written_to_its_end() {
    let (tokenizer, vocabulary) = published("qwen2");
    let random = Random::new(&tokenizer, &vocabulary);
    let parts = ["an", "er", "con", "tion", "ba", "но", "中", "ka", "é", "st", "gr", "ol", "\\", "\"", "/", " "];
    let part = |number: usize, shift: usize| parts[((number * 31) >> shift) % 16];
    let text = |number| format!("{}{}{} {number}", part(number, 0), part(number, 4), part(number, 8));
    let texts: Vec<String> = (0..2000).map(text).collect();
    let schema = Grammar::compile(&vocabulary, &Form::JsonSchema(json!({"enum": texts}))).unwrap();
    let choice = Grammar::compile(&vocabulary, &Form::Choice(texts.clone())).unwrap();
    for seed in 0..20 {
        let (_, Outcome::Ended(written)) = random.write(&schema, seed, 100) else { panic!("it did not end") };
        assert!(texts.contains(&serde_json::from_str(&written).unwrap()), "{written}");
        let (_, Outcome::Ended(written)) = random.write(&choice, seed, 100) else { panic!("it did not end") };
        assert!(texts.contains(&written), "{written}");
    }
}

#[test]
fn regular_expressions_match_all_of_the_text() {
    let (tokenizer, vocabulary) = published("qwen2");
    let random = Random::new(&tokenizer, &vocabulary);
    for regex in ["[a-z]{3}-[0-9]{2}", "(yes|no)/x?", "\\p{Greek}{2,4}", ""] {
        let grammar = Grammar::compile(&vocabulary, &Form::Regex(regex.into())).unwrap();
        let whole = regex::Regex::new(&format!("^(?:{regex})$")).unwrap();
        for seed in 0..10 {
            let (_, outcome) = random.write(&grammar, seed, 100);
            let Outcome::Ended(text) = outcome else { panic!("{regex}: {outcome:?}") };
            assert!(whole.is_match(&text), "{regex}: {text:?}");
        }
    }
    for bad in ["(", "a{2,1}", "(?=a)b", "a^b", &"(".repeat(20_000), "[", "(?i", &"a".repeat(100_000)] {
        assert!(Grammar::compile(&vocabulary, &Form::Regex(bad.into())).is_err(), "{bad}");
    }
}

#[test]
fn special_tokens_are_written_only_where_the_grammar_names_them() {
    for (kind, name) in [("gpt_oss", "<|call|>"), ("llama3", "<|end_header_id|>"), ("qwen2", "<|im_start|>")] {
        let (tokenizer, vocabulary) = published(kind);
        let random = Random::new(&tokenizer, &vocabulary);
        let id = tokenizer.token_id(name).unwrap();
        let schema = json!({"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]});
        let schema = lark_json(&schema);
        let texts = [format!("start: {} {schema} {name}", vocabulary.lark_text(&format!("to=f{name}")))];
        for text in texts {
            let grammar = Grammar::compile(&vocabulary, &Form::Lark(text)).unwrap();
            for seed in 0..5 {
                let (ids, outcome) = random.write(&grammar, seed, 300);
                assert!(matches!(outcome, Outcome::Ended(_)), "{outcome:?}");
                let special = ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
                assert_eq!(special, 2, "{kind}");
                assert_eq!(ids.last(), Some(&id));
            }
        }
    }
}

#[test]
fn a_grammar_stands_behind_thinking() {
    for kind in ["qwen2", "gpt_oss", "deepseek"] {
        let (tokenizer, vocabulary) = published(kind);
        let random = Random::new(&tokenizer, &vocabulary);
        let plain = Grammar::compile(&vocabulary, &Form::JsonObject).unwrap();
        for marker in ["</think>", "aab", ""] {
            let grammar = plain.clone().behind(marker);
            let mut constraint = grammar.constraint();
            let thought = format!("aaa thinks </thin </thin{marker}");
            let thought = if marker.is_empty() { String::new() } else { thought };
            for id in tokenizer.encode(&thought, false).unwrap() {
                assert!(!constraint.is_complete());
                let mut logits = vec![0.0; tokenizer.vocab_size() + 1];
                constraint.mask(&mut logits);
                assert!(logits[id as usize].is_finite(), "{kind}: {id} in {thought:?}");
                let end = tokenizer.end_token().unwrap() as usize;
                assert!(logits[end].is_infinite() && logits[tokenizer.vocab_size()].is_infinite());
                constraint.accept(id);
            }
            for seed in 0..5 {
                let mut constraint = grammar.constraint();
                for id in tokenizer.encode(&thought, false).unwrap() {
                    constraint.accept(id);
                }
                let (_, outcome) = random.write_with(constraint.as_mut(), seed, 300);
                let Outcome::Ended(text) = outcome else { panic!("{kind}: {outcome:?}") };
                let value = serde_json::from_str::<Value>(&text);
                assert!(value.is_ok_and(|value| value.is_object()), "{kind}, {marker:?}: {text:?}");
            }
        }
    }
}

#[test]
fn a_token_that_does_not_fit_lets_nothing_follow() {
    let (tokenizer, vocabulary) = published("qwen2");
    let grammar = Grammar::compile(&vocabulary, &Form::JsonObject).unwrap();
    for bad in [tokenizer.token_id("a").unwrap(), u32::MAX, tokenizer.end_token().unwrap()] {
        let mut constraint = grammar.constraint();
        constraint.accept(bad);
        assert!(!constraint.is_complete());
        let mut logits = vec![0.0; tokenizer.vocab_size() + 1];
        constraint.mask(&mut logits);
        assert!(logits.iter().all(|l| *l == f32::NEG_INFINITY));
    }
}

#[test]
fn grammars_that_cannot_be_used_are_refused() {
    let (_, vocabulary) = published("qwen2");
    for bad in
        ["", "start: other", "start: \"", "a: \"b\"", "start: %json {\"type\": 1}", "start: <|none|>", "start: start"]
    {
        let error = Grammar::compile(&vocabulary, &Form::Lark(bad.into())).unwrap_err();
        let text = error.to_string();
        assert!(!text.contains("backtrace") && text.len() < 600, "{text}");
    }
    let deep = format!("start: {}\"a\"{}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(matches!(Grammar::compile(&vocabulary, &Form::Lark(deep)), Err(GrammarError::TooLarge { .. })));
}

#[test]
fn callers_that_come_all_at_once_wait_for_each_other() {
    // More than there are places: the requests of a batch are checked by all threads of a machine.
    const CALLERS: usize = 40;
    let (_, vocabulary) = published("qwen2");
    let texts = (0..100).map(|n| format!("a text with the number {n}")).collect();
    let form = Form::Choice(texts);
    let all = Barrier::new(CALLERS);
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                all.wait();
                for _ in 0..8 {
                    Grammar::compile(&vocabulary, &form).unwrap();
                }
            });
        }
    });
}
