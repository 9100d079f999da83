//! One word for one thing: what a rule about words looks for, in identifiers, comments and messages.

/// Whether a line has these words one after another, with only a space, `-` or `_` between them. A word that ends in `*` matches
/// all words with that beginning.
pub(crate) fn mentions(line: &str, phrase: &[&str]) -> bool {
    let joins = |c: char| c.is_alphabetic() || matches!(c, ' ' | '-' | '_');
    line.split(|c| !joins(c)).any(|part| {
        let is_phrase = |found: &[String]| found.iter().zip(phrase).all(|(word, wanted)| matches(word, wanted));
        words(part).windows(phrase.len()).any(is_phrase)
    })
}

fn matches(word: &str, wanted: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(start) => word.starts_with(start),
        None => word == wanted,
    }
}

/// Words in lower case: `LookAhead`, `look_ahead` and `look-ahead` are two words each.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut previous_is_lower = false;
    for c in line.chars() {
        if !c.is_alphabetic() || (c.is_uppercase() && previous_is_lower) {
            words.push(String::new());
        }
        if c.is_alphabetic() {
            words.last_mut().expect("there is one").extend(c.to_lowercase());
        }
        previous_is_lower = c.is_lowercase();
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn identifiers_are_words_too() {
    assert_eq!(words("fn look_ahead GuessOf"), ["fn", "look", "ahead", "guess", "of"]);
    assert!(mentions("// It looks ahead.", &["look*", "ahead"]));
    assert!(mentions("struct LookAhead;", &["look*", "ahead"]));
    assert!(mentions("on a guess,", &["guess*"]));
    assert!(!mentions("let outguessed = 1;", &["guess*"]));
    assert!(!mentions("look(ahead)", &["look*", "ahead"]));
    assert!(!mentions("look at what is ahead", &["look*", "ahead"]));
}
