//! The official test suite of JSON Schema and the schemas of real tools: what is supported is enforced, what is not is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::common::{Outcome, Random, published};
use serde::Deserialize;
use serde_json::Value;
use sluice_grammar::{Form, Grammar, GrammarError, is_valid};

/// A schema, and values with the answer whether they are valid.
#[derive(Deserialize)]
struct Case {
    file: String,
    case: String,
    schema: Value,
    tests: Vec<(Value, bool)>,
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/schemas");
    let texts = ["suite.jsonl", "tools.jsonl"].map(|name| fs::read_to_string(folder.join(name)).unwrap());
    texts.iter().flat_map(|text| text.lines()).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn values_are_valid_as_the_official_suite_says() {
    let (mut right, mut refused) = (0, 0);
    let mut wrong = Vec::new();
    // Here `format` and the like demand something, which they do only where a program says so; numbers are larger than 64 bits; or
    // a schema says that its keywords mean nothing.
    let elsewhere = ["optional/format", "optional/content.json", "optional/float-overflow.json", "vocabulary.json"];
    for case in cases().iter().filter(|case| !elsewhere.iter().any(|part| case.file.contains(part))) {
        for (value, want) in &case.tests {
            match is_valid(&case.schema, value) {
                Ok(valid) if valid == *want => right += 1,
                Ok(_) => wrong.push(format!("{}: {}: {value}", case.file, case.case)),
                Err(_) => refused += 1,
            }
        }
    }
    println!("{right} answers are right, {refused} schemas refused");
    assert!(right > 3000, "{right}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the patterns of a schema say, for a model that copies.
fn patterns(schema: &Value) -> String {
    match schema {
        Value::Object(map) => {
            let own = ["pattern", "patternProperties"].iter().filter_map(|keyword| map.get(*keyword));
            let own = own.map(|value| match value {
                Value::Object(map) => map.keys().cloned().collect::<Vec<_>>().join(" "),
                other => other.as_str().unwrap_or_default().to_owned(),
            });
            let mut own = own.collect::<String>();
            for (syntax, text) in
                [("\\*", "*"), ("^", ""), ("?$", ""), ("$", ""), ("\\p{Letter}", "a"), ("\\w", "a"), ("[\\s\\S]*", "")]
            {
                own = own.replace(syntax, text);
            }
            own + &map.values().map(patterns).collect::<String>()
        }
        Value::Array(list) => list.iter().map(patterns).collect(),
        _ => String::new(),
    }
}

/// How a schema fared.
enum Fate {
    Supported,
    /// With the keyword.
    Refused(String),
}

/// Compiles a schema and has texts written by it. What is wrong goes into `wrong`.
fn try_schema(case: &Case, random: &mut Random<'_>, texts: u64, wrong: &mut Vec<String>) -> Fate {
    let name = format!("{}: {}", case.file, case.case);
    let grammar = match Grammar::compile(random.vocabulary, &Form::JsonSchema(case.schema.clone())) {
        Ok(grammar) => grammar,
        Err(GrammarError::Unsupported { keyword, .. }) => return Fate::Refused(keyword),
        Err(GrammarError::Unsatisfiable { .. }) => {
            // An answer too, unless the suite knows a value that is valid.
            if case.tests.iter().any(|(_, valid)| *valid) {
                wrong.push(format!("{name}: said to allow nothing"));
            }
            return Fate::Refused("nothing allowed".into());
        }
        Err(error) => {
            wrong.push(format!("{name}: {error}"));
            return Fate::Refused("error".into());
        }
    };
    random.prompt = patterns(&case.schema);
    for seed in 0..texts {
        let (_, outcome) = random.write(&grammar, seed, 600);
        let Outcome::Ended(text) = outcome else {
            wrong.push(format!("{name}: {outcome:?}").chars().take(300).collect());
            continue;
        };
        let valid = serde_json::from_str(&text).map_err(|e| e.to_string());
        let valid = valid.and_then(|value| is_valid(&case.schema, &value).map_err(|e| e.to_string()));
        if valid != Ok(true) {
            wrong.push(format!("{name}: {valid:?}: {text}"));
        }
    }
    Fate::Supported
}

/// `SLUICE_SCHEMA_TEXTS` says how many texts to write by each schema; without it there are few, by a sixth of the suite.
#[test]
fn texts_are_valid_and_end() {
    let texts = std::env::var("SLUICE_SCHEMA_TEXTS").ok().map(|texts| texts.parse::<u64>().expect("a number"));
    let (tokenizer, vocabulary) = published("qwen2");
    let mut random = Random::new(&tokenizer, &vocabulary);
    let (mut total, mut supported, mut wrong) = (0, 0, Vec::new());
    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    let cases = cases().into_iter().enumerate();
    for (_, case) in cases.filter(|(at, case)| texts.is_some() || at.is_multiple_of(6) || case.file == "tools") {
        total += 1;
        match try_schema(&case, &mut random, texts.unwrap_or(4), &mut wrong) {
            Fate::Supported => supported += 1,
            Fate::Refused(keyword) => *refused.entry(keyword).or_default() += 1,
        }
    }
    println!("{supported} of {total} schemas are supported; refused: {refused:?}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(supported * 10 >= total * 7, "{supported} of {total}");
}
