//! Forms of texts: a caller asks for one, and it is checked and compiled.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use serde_json::Value;
use sluice_generate::Constraint;

use crate::constraint::{Behind, Matching};
use crate::error::clip;
use crate::places::MAX_TIME;
use crate::{GrammarError, Vocabulary, lark, schema};

/// Longest regular expression that a caller may bring, in bytes.
const MAX_REGEX_BYTES: usize = 32 << 10;

/// Stack for compiling a grammar, in bytes: the library calls itself for each rule that refers to another. Only the used part of
/// the stack takes memory.
const STACK_BYTES: usize = 256 << 20;

/// The form that a text must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that is valid against this schema.
    JsonSchema(Value),
    /// All of the text matches this regular expression, in the syntax of Rust's `regex`, without anchors and assertions.
    Regex(String),
    /// A context-free grammar in the library's variant of Lark, with `start` as its first rule. `<|name|>` is a special token, and
    /// `%json {…}` a value that fits a schema.
    Lark(String),
    /// Exactly this text. Spellings of special tokens in it stand for these tokens.
    Text(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Form {
    /// Its name in errors.
    fn name(&self) -> &'static str {
        match self {
            Form::JsonObject | Form::JsonSchema(_) => "schema",
            Form::Regex(_) => "regular expression",
            Form::Lark(_) => "grammar",
            Form::Text(_) => "text",
            Form::Choice(_) => "list of texts",
        }
    }
}

/// A form, checked and compiled for a vocabulary. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    vocabulary: Vocabulary,
    /// At the beginning of the text. Each constraint has a copy.
    matcher: Arc<Matcher>,
    behind: Option<Arc<Behind>>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("vocabulary", &self.vocabulary)
            .field("behind", &self.behind)
            .finish_non_exhaustive()
    }
}

impl Grammar {
    /// Checks a form and compiles it.
    ///
    /// Refuses demands that cannot be enforced. A schema's references must stay inside the schema: nothing is
    /// fetched. Callers that come all at once wait for each other.
    ///
    /// # Errors
    /// When the form is malformed, too large, allows nothing, or asks for something that is not supported; when too many others have
    /// taken too long, and have not ended yet.
    pub fn compile(vocabulary: &Vocabulary, form: &Form) -> Result<Grammar, GrammarError> {
        let invalid = |reason: String| GrammarError::Invalid { what: form.name(), reason };
        let place = vocabulary.places().take()?;
        // A thread with a stack of its own, which also confines a panic of the library.
        let (sender, receiver) = mpsc::channel();
        let (own, own_form) = (vocabulary.clone(), form.clone());
        let work = move || {
            let matcher = matcher(&own, &own_form);
            drop(place);
            // If this took too long, nobody waits any more.
            let _ = sender.send(matcher);
        };
        let thread = thread::Builder::new().name("sluice-grammar".into()).stack_size(STACK_BYTES);
        thread.spawn(work).map_err(|e| invalid(format!("no thread can be started: {e}")))?;
        let matcher = match receiver.recv_timeout(MAX_TIME) {
            Ok(matcher) => matcher?,
            Err(RecvTimeoutError::Disconnected) => return Err(invalid("it crashed the library".into())),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("too many seconds to compile the {}", form.name());
                return Err(GrammarError::TooLarge { what, limit: MAX_TIME.as_secs() as usize });
            }
        };
        Ok(Grammar { vocabulary: vocabulary.clone(), matcher: Arc::new(matcher), behind: None })
    }

    /// A constraint at the beginning of its text.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(Matching::new(self.vocabulary.clone(), self.matcher.deep_clone(), self.behind.clone()))
    }

    /// The same after free text: until the model has written `marker` (such as `</think>`), everything but an end
    /// token is allowed; then white space, then the grammar. For models that think before they answer.
    pub fn behind(self, marker: &str) -> Grammar {
        let behind = Some(Arc::new(Behind::new(&self.vocabulary, marker)));
        Grammar { behind, ..self }
    }
}

fn of_regex(regex: &str) -> Result<String, GrammarError> {
    if regex.len() > MAX_REGEX_BYTES {
        let what = format!("a regular expression of {} bytes", regex.len());
        return Err(GrammarError::TooLarge { what, limit: MAX_REGEX_BYTES });
    }
    match regex.is_empty() {
        true => Ok("start: \"\"\n".to_owned()),
        false => {
            let whole = schema::whole_regex(regex)
                .map_err(|reason| GrammarError::Invalid { what: "regular expression", reason: clip(&reason) })?;
            Ok(format!("start: /{}/\n", llguidance::regex_to_lark(&whole, "")))
        }
    }
}

/// A caller's grammar with its schemas compiled.
fn with_schemas(text: &str) -> Result<String, GrammarError> {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (range, value) in lark::scan(text)? {
        out.push_str(&text[done..range.start]);
        out.push_str("%lark {\n");
        out.push_str(&schema::lark(&value)?);
        out.push('}');
        done = range.end;
    }
    out.push_str(&text[done..]);
    Ok(out)
}

/// A form's grammar in Lark.
fn lark(vocabulary: &Vocabulary, form: &Form) -> Result<String, GrammarError> {
    match form {
        Form::JsonObject => schema::lark(&serde_json::json!({"type": "object"})),
        Form::JsonSchema(schema) => schema::lark(schema),
        Form::Regex(regex) => of_regex(regex),
        Form::Lark(text) => with_schemas(text),
        Form::Text(text) => Ok(format!("start: {}\n", vocabulary.lark_text(text))),
        Form::Choice(texts) if texts.is_empty() => {
            Err(GrammarError::Invalid { what: form.name(), reason: "there is nothing to choose from".into() })
        }
        Form::Choice(texts) => {
            let (empty, texts): (Vec<String>, Vec<String>) = texts.iter().cloned().partition(String::is_empty);
            let mut start = Vec::new();
            start.extend((!texts.is_empty()).then_some("CHOICE"));
            start.extend((!empty.is_empty()).then_some("\"\""));
            let choice = if texts.is_empty() { String::new() } else { format!("CHOICE: {}\n", lark::one_of(&texts)) };
            Ok(format!("start: {}\n{choice}", start.join(" | ")))
        }
    }
}

/// Compiles a form.
fn matcher(vocabulary: &Vocabulary, form: &Form) -> Result<Matcher, GrammarError> {
    let invalid = |reason: String| GrammarError::Invalid { what: form.name(), reason: clip(&reason) };
    let text = lark(vocabulary, form)?;
    let parser = vocabulary.factory().create_parser(TopLevelGrammar::from_lark(text));
    let mut matcher = Matcher::new(Ok(parser.map_err(|e| invalid(e.to_string()))?));
    if let Some(error) = matcher.get_error() {
        return Err(invalid(error));
    }
    // The first mask shows whether any text is possible. What it takes of the lexer is then there for all constraints.
    matcher.compute_mask_or_eos().map_err(|e| invalid(e.to_string()))?;
    Ok(matcher)
}
