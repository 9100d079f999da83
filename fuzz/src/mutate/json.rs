//! Mutations of JSON documents that leave them JSON.

use serde_json::{Map, Number, Value};

use super::random::Random;

/// What mutations put in: the values of sound documents, and their strings and keys.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    values: Vec<Value>,
    strings: Vec<String>,
}

/// Strings that code trips over: empty, odd, numbers of Python, and names that lead elsewhere.
const ODD: [&str; 16] = [
    "", " ", "a", "\u{0}", "\u{fffd}", "🦀", "NaN", "Infinity", "null", "true", "-1", "1e999", "../..", "/", "▁", "\n",
];

impl Pool {
    pub(crate) fn of(documents: impl IntoIterator<Item = Value>) -> Self {
        let mut pool = Self { values: Vec::new(), strings: ODD.map(str::to_owned).to_vec() };
        documents.into_iter().for_each(|document| pool.add(document));
        pool.strings.sort();
        pool.strings.dedup();
        pool
    }

    fn add(&mut self, value: Value) {
        match &value {
            // The first entries of long lists stand for the rest: vocabularies would crowd out all else.
            Value::Array(list) => list.iter().take(40).for_each(|v| self.add(v.clone())),
            Value::Object(map) => map.iter().take(80).for_each(|(key, v)| {
                self.strings.push(key.clone());
                self.add(v.clone());
            }),
            Value::String(s) if s.len() < 200 => self.strings.push(s.clone()),
            _ => {}
        }
        if value.to_string().len() < 2000 {
            self.values.push(value);
        }
    }
}

/// Changes a document in a few places.
pub(crate) fn mutate(document: &mut Value, pool: &Pool, random: &mut Random) {
    for _ in 0..1 + random.below(3) {
        let spare =
            if random.one_in(4) { Some(pick(document, random).clone()) } else { random.pick(&pool.values).cloned() };
        let place = pick_mut(document, random);
        change(place, spare.unwrap_or_default(), pool, random);
    }
}

/// A value somewhere in a document: deep ones are as likely as shallow ones.
fn pick<'v>(value: &'v Value, random: &mut Random) -> &'v Value {
    let children: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    };
    if children.is_empty() || random.one_in(4) {
        return value;
    }
    pick(children[random.below(children.len())], random)
}

fn pick_mut<'v>(value: &'v mut Value, random: &mut Random) -> &'v mut Value {
    let children = match &*value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if children == 0 || random.one_in(4) {
        return value;
    }
    let chosen = random.below(children);
    match value {
        Value::Array(list) => pick_mut(&mut list[chosen], random),
        Value::Object(map) => match map.values_mut().nth(chosen) {
            Some(child) => pick_mut(child, random),
            None => unreachable!("it was counted"),
        },
        _ => unreachable!("it has children"),
    }
}

fn change(place: &mut Value, spare: Value, pool: &Pool, random: &mut Random) {
    if random.one_in(6) {
        *place = spare;
        return;
    }
    match place {
        Value::Null => *place = spare,
        Value::Bool(b) => *b = !*b,
        Value::Number(n) => *place = number(n, random),
        Value::String(s) => string(s, pool, random),
        Value::Array(list) => array(list, spare, random),
        Value::Object(map) => object(map, spare, pool, random),
    }
}

fn number(old: &Number, random: &mut Random) -> Value {
    let Some(whole) = old.as_u64().filter(|_| !random.one_in(6)) else {
        let old = old.as_f64().unwrap_or(1.0);
        let odd =
            [0.0, -0.0, 1.0, -1.0, 0.5, f64::MAX, f64::MIN_POSITIVE, 1e-45, 1e39, old * 2.0, -old, old + 1.0, 1e15];
        return random.pick(&odd).copied().unwrap_or(old).into();
    };
    match random.one_in(8) {
        true => Value::from(-(random.below(10) as i64)),
        false => random.number(whole).into(),
    }
}

fn string(s: &mut String, pool: &Pool, random: &mut Random) {
    match random.below(5) {
        0 | 1 => random.pick(&pool.strings).cloned().unwrap_or_default().clone_into(s),
        2 => {
            let extra = random.pick(&pool.strings).cloned().unwrap_or_default();
            let at = s.char_indices().map(|(at, _)| at).nth(random.below(s.chars().count())).unwrap_or(s.len());
            s.insert_str(at, &extra);
        }
        3 => drop(s.pop()),
        // Doubling grows fast, and is cut again where inputs get too long.
        _ => *s = s.repeat(2 + random.below(3)),
    }
}

fn array(list: &mut Vec<Value>, spare: Value, random: &mut Random) {
    let at = random.below(list.len());
    match random.below(5) {
        0 if !list.is_empty() => drop(list.remove(at)),
        1 if !list.is_empty() => list.insert(at, list[at].clone()),
        2 if !list.is_empty() => {
            let other = random.below(list.len());
            list.swap(at, other);
        }
        3 => list.truncate(at),
        _ => list.insert(at, spare),
    }
}

fn object(map: &mut Map<String, Value>, spare: Value, pool: &Pool, random: &mut Random) {
    let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
    let new = random.pick(&pool.strings).cloned().unwrap_or_default();
    match random.below(5) {
        0 => drop(map.shift_remove(&key)),
        1 => {
            if let Some(value) = map.shift_remove(&key) {
                map.insert(new, value);
            }
        }
        2 => {
            let value = map.get(&key).cloned().unwrap_or(spare);
            map.insert(new, value);
        }
        3 => drop(map.insert(key, spare)),
        _ => drop(map.insert(new, spare)),
    }
}
