//! The template engine, set up to behave as Hugging Face's Jinja2 does.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior};

use super::TextError;
use super::clock::strftime;
use super::marks::Marks;
use super::python::{Json, Pay, charge_all, invalid, items, to_str};
use super::source::{GUARD_FILTER, IN_TEST, Source};
use super::strings::{self, Text};

/// What a template may cost: a unit is an instruction or 64 bytes. The fixed part is enough for any
/// template that does not loop over messages.
const FUEL: u64 = 1_000_000;
/// Additional units for each message or tool.
const FUEL_PER_MESSAGE: u64 = 20_000;
/// How often a template may copy the whole conversation.
const COPIES: u64 = 64;

/// Deepest nesting of macros and blocks.
const MAX_RECURSION: usize = 150;

/// Longest explanation of an error that is passed on.
const MAX_REASON_CHARS: usize = 200;

/// A template's own error, which distinguishes `raise_exception` from errors of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// An engine for one rendering.
pub(super) fn engine(marks: &Arc<Marks>, now: i64, messages: usize, bytes: usize) -> Environment<'static> {
    let mut env = Environment::new();
    // This fails only for delimiters, which stay as they are.
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(MAX_RECURSION);
    let fuel = FUEL + FUEL_PER_MESSAGE * messages as u64 + COPIES * (bytes as u64 / 64);
    env.set_fuel(Some(fuel));

    let m = Arc::clone(marks);
    env.set_formatter(move |out, state, value| {
        let text = to_str(&m, &|n| state.consume_fuel(n), value)?;
        out.write_str(&text).map_err(Error::from)
    });
    let m = Arc::clone(marks);
    env.set_unknown_method_callback(move |state, value, name, args| {
        method(&m, &|n| state.consume_fuel(n), value, name, args)
    });
    env.add_function("strftime_now", move |format: &str| strftime(format, now));
    let m = Arc::clone(marks);
    env.add_function("raise_exception", move |state: &State<'_, '_>, message: Value| -> Result<Value, Error> {
        let message = to_str(&m, &|n| state.consume_fuel(n), &message)?;
        let message = m.plain_text(&message).into_owned();
        Err(invalid("the template objects").with_source(Raised(message)))
    });
    let m = Arc::clone(marks);
    env.add_test(IN_TEST, move |state: &State<'_, '_>, value: &Value, container: &Value| {
        contains(&m, &|n| state.consume_fuel(n), value, container)
    });
    let m = Arc::clone(marks);
    env.add_test("in", move |state: &State<'_, '_>, value: &Value, container: &Value| {
        contains(&m, &|n| state.consume_fuel(n), value, container)
    });
    add_tests(&mut env);
    add_text_filters(&mut env, marks);
    add_value_filters(&mut env, marks);
    env
}

/// Tests in which Jinja2 and the engine differ.
fn add_tests(env: &mut Environment<'_>) {
    let plural = |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain)
    };
    env.add_test("iterable", plural);
    env.add_test("sequence", plural);
}

/// Filters on text. Jinja2 turns whatever they get into a string first.
fn add_text_filters(env: &mut Environment<'_>, marks: &Arc<Marks>) {
    let m = Arc::clone(marks);
    env.add_filter("string", move |state: &State<'_, '_>, value: &Value| to_str(&m, &|n| state.consume_fuel(n), value));
    let m = Arc::clone(marks);
    env.add_filter("trim", move |state: &State<'_, '_>, value: &Value, chars: Option<Value>| {
        let pay: Pay<'_> = &|n| state.consume_fuel(n);
        Text::new(&m, pay, &to_str(&m, pay, value)?).strip(chars.as_ref(), true, true)
    });
    let m = Arc::clone(marks);
    env.add_filter(
        "replace",
        move |state: &State<'_, '_>, value: &Value, old: Value, new: Value, count: Option<i64>| {
            let pay: Pay<'_> = &|n| state.consume_fuel(n);
            Text::new(&m, pay, &to_str(&m, pay, value)?).replace(&old, &new, count)
        },
    );
    for name in ["upper", "lower", "title", "capitalize"] {
        let m = Arc::clone(marks);
        env.add_filter(name, move |state: &State<'_, '_>, value: &Value| {
            let pay: Pay<'_> = &|n| state.consume_fuel(n);
            strings::method(&m, pay, &to_str(&m, pay, value)?, name, &[])
        });
    }
    let m = Arc::clone(marks);
    env.add_filter("join", move |state: &mut State<'_, '_>, list: &Value, between: Option<Value>, named: Kwargs| {
        let between = between.or(named.get("d")?).unwrap_or_else(|| Value::from(""));
        let attribute: Option<Value> = named.get("attribute")?;
        named.assert_all_used()?;
        let list = match attribute {
            Some(name) => {
                let name = Value::from(Kwargs::from_iter([("attribute", name)]));
                state.apply_filter("map", &[list.clone(), name])?
            }
            None => list.clone(),
        };
        let pay: Pay<'_> = &|n| state.consume_fuel(n);
        strings::join(&m, pay, &listed(pay, &list)?, &to_str(&m, pay, &between)?)
    });
}

/// Filters on other values.
fn add_value_filters(env: &mut Environment<'_>, marks: &Arc<Marks>) {
    let m = Arc::clone(marks);
    env.add_filter(
        "tojson",
        move |state: &State<'_, '_>, value: &Value, ascii: Option<bool>, indent: Option<Value>, named: Kwargs| {
            let ascii = ascii.or(named.get("ensure_ascii")?);
            let indent = indent.or(named.get("indent")?);
            let (separators, sort) = (named.get("separators")?, named.get("sort_keys")?);
            named.assert_all_used()?;
            Json::new(&m, &|n| state.consume_fuel(n), ascii, indent, separators, sort)?.write(value)
        },
    );
    env.add_filter(GUARD_FILTER, |state: &State<'_, '_>, value: &Value| {
        let pay: Pay<'_> = &|n| state.consume_fuel(n);
        charge_all(pay, value, 0)?;
        match value.kind() {
            // Whatever this was before, it is a plain list now.
            ValueKind::Seq | ValueKind::Iterable if !value.is_tuple() => listed(pay, value),
            _ => Ok(value.clone()),
        }
    });
    // Jinja2 does not know these, and `chain` has the problem that the guard is for.
    for name in ["chain", "zip", "split", "lines", "bool"] {
        env.remove_filter(name);
    }
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| match value.kind() {
            ValueKind::Undefined => Ok(0),
            _ => value.len().ok_or_else(|| invalid(format!("{} has no length", value.kind()))),
        });
    }
    env.add_filter("list", |state: &State<'_, '_>, value: &Value| listed(&|n| state.consume_fuel(n), value));
    let m = Arc::clone(marks);
    env.add_filter("int", move |value: &Value, default: Option<i64>| {
        let default = default.unwrap_or(0);
        match value.as_str() {
            Some(s) => {
                let s = m.plain_text(s);
                let s = s.trim();
                let float = || s.parse::<f64>().ok().filter(|x| x.is_finite()).map(|x| x as i64);
                Value::from(s.parse::<i64>().ok().or_else(float).unwrap_or(default))
            }
            None if value.is_integer() => value.clone(),
            None if value.kind() == ValueKind::Bool => Value::from(i64::from(value.is_true())),
            None => Value::from(f64::try_from(value.clone()).map_or(default, |x| x as i64)),
        }
    });
    let m = Arc::clone(marks);
    env.add_filter("float", move |value: &Value, default: Option<f64>| {
        let number = match value.as_str() {
            Some(s) => m.plain_text(s).trim().parse().ok(),
            None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
            None => f64::try_from(value.clone()).ok(),
        };
        number.unwrap_or(default.unwrap_or(0.0))
    });
}

/// The result of Python's `list` for a value.
fn listed(pay: Pay<'_>, value: &Value) -> Result<Value, Error> {
    if let Some(s) = value.as_str() {
        pay(s.len() as u64)?;
        return Ok(s.chars().map(|c| Value::from(String::from(c))).collect());
    }
    Ok(Value::from(items(pay, value)?))
}

/// Python's `value in container`.
fn contains(marks: &Marks, pay: Pay<'_>, value: &Value, container: &Value) -> Result<bool, Error> {
    match container.kind() {
        ValueKind::String => Text::new(marks, pay, container.as_str().unwrap_or("")).contains(value),
        ValueKind::Undefined => Ok(false),
        ValueKind::Map => Ok(container.as_object().is_some_and(|o| o.get_value(value).is_some())),
        ValueKind::Seq | ValueKind::Iterable => {
            charge_all(pay, value, 0)?;
            for item in container.try_iter()?.checked() {
                pay(1)?;
                if item? == *value {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        kind => Err(invalid(format!("argument of type {kind} cannot contain anything"))),
    }
}

/// Python's methods.
fn method(marks: &Marks, pay: Pay<'_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    match value.kind() {
        ValueKind::String => strings::method(marks, pay, value.as_str().unwrap_or(""), name, args),
        ValueKind::Map => {
            let map = value.as_object().ok_or_else(unknown)?;
            match name {
                "items" | "keys" | "values" => {
                    let () = from_args(args)?;
                    let pairs = map.try_iter_pairs().into_iter().flatten();
                    Ok(match name {
                        "keys" => pairs.map(|(key, _)| key).collect(),
                        "values" => pairs.map(|(_, value)| value).collect(),
                        _ => pairs.map(|(k, v)| Value::from(minijinja::value::Tuple::from([k, v]))).collect(),
                    })
                }
                "get" => {
                    let (key, default): (Value, Option<Value>) = from_args(args)?;
                    Ok(map.get_value(&key).unwrap_or_else(|| default.unwrap_or(Value::from(()))))
                }
                "copy" => Ok(value.clone()),
                _ => Err(unknown()),
            }
        }
        ValueKind::Seq | ValueKind::Iterable if matches!(name, "count" | "index") => {
            let (what,): (Value,) = from_args(args)?;
            let items: Vec<bool> = items(pay, value)?.iter().map(|item| *item == what).collect();
            match name {
                "count" => Ok(Value::from(items.iter().filter(|same| **same).count())),
                _ => {
                    items.iter().position(|same| *same).map(Value::from).ok_or_else(|| invalid("value is not in list"))
                }
            }
        }
        _ => Err(unknown()),
    }
}

/// Renders, and explains errors.
pub(super) fn render(env: &Environment<'_>, source: &Source, context: Value) -> Result<String, TextError> {
    let template = env.template_from_str(&source.text).map_err(|e| explain(&e))?;
    template.render(context).map_err(|e| explain(&e))
}

/// An engine's error in one line.
fn explain(error: &Error) -> TextError {
    // The engine wraps errors on their way out of macros and the like.
    let mut innermost = error;
    let mut raised = None;
    let mut next = std::error::Error::source(error);
    while let Some(inner) = next {
        innermost = inner.downcast_ref().unwrap_or(innermost);
        raised = inner.downcast_ref::<Raised>().or(raised);
        next = inner.source();
    }
    let short = |text: &str| {
        let mut short: String = text.chars().take(MAX_REASON_CHARS).collect();
        if short.len() < text.len() {
            short.push('…');
        }
        short
    };
    if let Some(Raised(reason)) = raised {
        return TextError::ChatRefused { reason: short(reason) };
    }
    let reason = match innermost.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps, or produces too much text".to_owned(),
        kind => match innermost.detail() {
            Some(detail) => format!("{kind}: {detail}"),
            None => kind.to_string(),
        },
    };
    TextError::ChatTemplate { line: innermost.line().or(error.line()), reason: short(&reason) }
}

/// Whether a template can be parsed.
pub(super) fn check(env: &Environment<'_>, source: &Source) -> Result<(), TextError> {
    env.template_from_str(&source.text).map(|_| ()).map_err(|e| explain(&e))
}
