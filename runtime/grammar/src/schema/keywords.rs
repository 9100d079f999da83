//! The demands of one schema, without those of the schemas inside it.

use std::rc::Rc;

use serde_json::{Map, Number, Value};

use super::document::{Document, Draft};
use crate::GrammarError;

/// The types of JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Type {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

impl Type {
    pub(crate) const ALL: [Type; 6] =
        [Type::Object, Type::Array, Type::String, Type::Number, Type::Boolean, Type::Null];

    pub(crate) fn of(value: &Value) -> Type {
        match value {
            Value::Null => Type::Null,
            Value::Bool(_) => Type::Boolean,
            Value::Number(_) => Type::Number,
            Value::String(_) => Type::String,
            Value::Array(_) => Type::Array,
            Value::Object(_) => Type::Object,
        }
    }
}

/// A demand on values of one type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Facet {
    /// Whether a number is an integer.
    Integer(bool),
    /// A number is at least this, or above it.
    Minimum(Number, bool),
    /// A number is at most this, or below it.
    Maximum(Number, bool),
    Multiple(Number),
    MinLength(u64),
    MaxLength(u64),
    /// Whether a part of a string matches.
    Pattern(Rc<str>, bool),
    Format(Rc<str>),
    MinItems(u64),
    MaxItems(u64),
    Unique,
    /// This many items are valid, or are not, against a node.
    Contains {
        node: usize,
        positive: bool,
        least: u64,
        most: Option<u64>,
    },
    /// All items are valid, or are not, against a node.
    Every(usize, bool),
    MinProperties(u64),
    MaxProperties(u64),
    Required(Rc<str>),
    Absent(Rc<str>),
    /// A property, if the object has it, is valid, or is not, against a node.
    Property(Rc<str>, usize, bool),
    /// Names of properties are valid against a node.
    Names(usize),
    /// The value is none of these.
    NoneOf(Rc<Vec<Value>>),
}

impl Facet {
    /// The type of the values on which it is demanded; `None`: all.
    pub(crate) fn kind(&self) -> Option<Type> {
        Some(match self {
            Facet::Integer(_) | Facet::Minimum(..) | Facet::Maximum(..) | Facet::Multiple(_) => Type::Number,
            Facet::MinLength(_) | Facet::MaxLength(_) | Facet::Pattern(..) | Facet::Format(_) => Type::String,
            Facet::MinItems(_) | Facet::MaxItems(_) | Facet::Unique | Facet::Contains { .. } | Facet::Every(..) => {
                Type::Array
            }
            Facet::NoneOf(_) => return None,
            _ => Type::Object,
        })
    }
}

/// Properties of objects by their names.
#[derive(Debug, Default)]
pub(crate) struct Properties {
    pub(crate) named: Vec<(Rc<str>, usize)>,
    pub(crate) patterns: Vec<(Rc<str>, usize)>,
    /// The others.
    pub(crate) additional: Option<usize>,
}

/// Items of arrays by their positions.
#[derive(Debug, Default)]
pub(crate) struct Items {
    pub(crate) first: Vec<usize>,
    pub(crate) rest: Option<usize>,
}

/// The demands of one schema.
#[derive(Debug, Default)]
pub(crate) struct Keywords {
    /// `true` and `false` are schemas too.
    pub(crate) boolean: Option<bool>,
    /// Which types are allowed. `integer` alone is a number and a facet.
    pub(crate) types: Option<Vec<Type>>,
    pub(crate) integers_only: bool,
    /// `enum` and `const`.
    pub(crate) values: Vec<Rc<Vec<Value>>>,
    /// `allOf` and `$ref`.
    pub(crate) all: Vec<usize>,
    pub(crate) any: Option<Vec<usize>>,
    pub(crate) one: Option<Vec<usize>>,
    pub(crate) not: Option<usize>,
    /// `if`, `then`, `else`.
    pub(crate) condition: Option<(usize, Option<usize>, Option<usize>)>,
    /// For a property: the schema that the object must satisfy if it has the property.
    pub(crate) dependent: Vec<(Rc<str>, usize)>,
    /// For a property: the properties that the object must have if it has this one.
    pub(crate) dependent_required: Vec<(Rc<str>, Vec<Rc<str>>)>,
    pub(crate) facets: Vec<Facet>,
    pub(crate) properties: Option<Rc<Properties>>,
    pub(crate) items: Option<Rc<Items>>,
    pub(crate) unevaluated_properties: Option<usize>,
    pub(crate) unevaluated_items: Option<usize>,
}

/// A schema while it is read.
struct Reader<'d, 'v> {
    document: &'d mut Document<'v>,
    node: usize,
    map: &'v Map<String, Value>,
}

impl Keywords {
    /// Reads a node.
    pub(crate) fn read(document: &mut Document<'_>, node: usize) -> Result<Keywords, GrammarError> {
        let map = match document.nodes[node].value {
            Value::Bool(boolean) => return Ok(Keywords { boolean: Some(*boolean), ..Keywords::default() }),
            Value::Object(map) => map,
            _ => {
                let place = document.nodes[node].place.clone();
                return Err(malformed("schema", place, "an object, true or false"));
            }
        };
        let mut reader = Reader { document, node, map };
        let mut keywords = Keywords::default();
        if let Some(reference) = reader.string("$ref")? {
            keywords.all.push(reader.document.follow(node, "$ref", reference)?);
            if reader.document.draft == Draft::Seven {
                return Ok(keywords);
            }
        }
        for keyword in ["$dynamicRef", "$recursiveRef"] {
            if let Some(reference) = reader.string(keyword)? {
                keywords.all.push(reader.document.follow(node, keyword, reference)?);
            }
        }
        reader.types(&mut keywords)?;
        reader.combinations(&mut keywords)?;
        reader.scalars(&mut keywords)?;
        reader.arrays(&mut keywords)?;
        reader.objects(&mut keywords)?;
        Ok(keywords)
    }
}

fn malformed(keyword: &str, place: String, expected: &'static str) -> GrammarError {
    GrammarError::Malformed { keyword: keyword.to_owned(), place, expected }
}

impl<'v> Reader<'_, 'v> {
    fn bad(&self, keyword: &str, expected: &'static str) -> GrammarError {
        malformed(keyword, self.document.nodes[self.node].place.clone(), expected)
    }

    fn string(&self, keyword: &str) -> Result<Option<&'v str>, GrammarError> {
        let value = self.map.get(keyword);
        value.map(|value| value.as_str().ok_or_else(|| self.bad(keyword, "a string"))).transpose()
    }

    fn count(&self, keyword: &str) -> Result<Option<u64>, GrammarError> {
        let whole = |value: &Value| {
            value.as_u64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64))
        };
        let value = self.map.get(keyword);
        value.map(|value| whole(value).ok_or_else(|| self.bad(keyword, "a whole number, 0 or more"))).transpose()
    }

    fn part(&mut self, value: &'v Value, keyword: &str) -> usize {
        self.document.number(value, self.node, keyword)
    }

    fn one(&mut self, keyword: &str) -> Option<usize> {
        let value = self.map.get(keyword)?;
        Some(self.part(value, keyword))
    }

    fn list(&mut self, keyword: &str) -> Result<Option<Vec<usize>>, GrammarError> {
        let Some(value) = self.map.get(keyword) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| self.bad(keyword, "a list of schemas"))?;
        Ok(Some(list.iter().enumerate().map(|(at, value)| self.part(value, &format!("{keyword}/{at}"))).collect()))
    }

    fn named(&mut self, keyword: &str) -> Result<Vec<(Rc<str>, usize)>, GrammarError> {
        let Some(value) = self.map.get(keyword) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| self.bad(keyword, "an object of schemas"))?;
        Ok(map
            .iter()
            .map(|(name, value)| (Rc::from(name.as_str()), self.part(value, &format!("{keyword}/{name}"))))
            .collect())
    }

    fn names(&self, keyword: &str, value: &Value) -> Result<Vec<Rc<str>>, GrammarError> {
        let names = value.as_array().and_then(|list| list.iter().map(|name| name.as_str().map(Rc::from)).collect());
        names.ok_or_else(|| self.bad(keyword, "a list of names"))
    }

    fn types(&self, keywords: &mut Keywords) -> Result<(), GrammarError> {
        if let Some(value) = self.map.get("type") {
            let bad = || self.bad("type", "null, boolean, integer, number, string, array, object, or a list of these");
            let names: Vec<&str> = match value {
                Value::String(name) => vec![name],
                Value::Array(list) => {
                    list.iter().map(|name| name.as_str().ok_or_else(bad)).collect::<Result<_, _>>()?
                }
                _ => return Err(bad()),
            };
            let mut types = Vec::new();
            for name in &names {
                types.push(match *name {
                    "null" => Type::Null,
                    "boolean" => Type::Boolean,
                    "number" | "integer" => Type::Number,
                    "string" => Type::String,
                    "array" => Type::Array,
                    "object" => Type::Object,
                    _ => return Err(bad()),
                });
            }
            keywords.integers_only = names.contains(&"integer") && !names.contains(&"number");
            keywords.types = Some(types);
        }
        if let Some(value) = self.map.get("const") {
            keywords.values.push(Rc::new(vec![value.clone()]));
        }
        if let Some(value) = self.map.get("enum") {
            let list = value.as_array().ok_or_else(|| self.bad("enum", "a list of values"))?;
            keywords.values.push(Rc::new(list.clone()));
        }
        Ok(())
    }

    fn combinations(&mut self, keywords: &mut Keywords) -> Result<(), GrammarError> {
        keywords.all.extend(self.list("allOf")?.unwrap_or_default());
        keywords.any = self.list("anyOf")?;
        keywords.one = self.list("oneOf")?;
        keywords.not = self.one("not");
        if let Some(condition) = self.one("if") {
            keywords.condition = Some((condition, self.one("then"), self.one("else")));
        }
        Ok(())
    }

    fn scalars(&self, keywords: &mut Keywords) -> Result<(), GrammarError> {
        let facets = &mut keywords.facets;
        for (keyword, exclusive_keyword) in [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")] {
            let facet = |number: &Number, exclusive: bool| match keyword {
                "minimum" => Facet::Minimum(number.clone(), exclusive),
                _ => Facet::Maximum(number.clone(), exclusive),
            };
            // Draft 4 has `true` here, which makes the other keyword exclusive.
            let flag = self.map.get(exclusive_keyword).and_then(Value::as_bool);
            match self.map.get(keyword) {
                Some(Value::Number(bound)) => facets.push(facet(bound, flag.unwrap_or(false))),
                Some(_) => return Err(self.bad(keyword, "a number")),
                None => {}
            }
            match self.map.get(exclusive_keyword) {
                Some(Value::Number(bound)) => facets.push(facet(bound, true)),
                Some(Value::Bool(_)) | None => {}
                Some(_) => return Err(self.bad(exclusive_keyword, "a number")),
            }
        }
        match self.map.get("multipleOf") {
            Some(Value::Number(number)) if number.as_f64().is_some_and(|f| f > 0.0) => {
                facets.push(Facet::Multiple(number.clone()));
            }
            Some(_) => return Err(self.bad("multipleOf", "a number above 0")),
            None => {}
        }
        facets.extend(self.count("minLength")?.map(Facet::MinLength));
        facets.extend(self.count("maxLength")?.map(Facet::MaxLength));
        facets.extend(self.string("pattern")?.map(|pattern| Facet::Pattern(pattern.into(), true)));
        facets.extend(self.string("format")?.map(|name| Facet::Format(name.into())));
        Ok(())
    }

    fn arrays(&mut self, keywords: &mut Keywords) -> Result<(), GrammarError> {
        let first = match self.document.draft {
            Draft::Twenty => self.list("prefixItems")?,
            _ => None,
        };
        let lists = matches!(self.map.get("items"), Some(Value::Array(_)));
        let (first, rest) = match first {
            // Only older versions allow a list in `items`.
            None if lists => (self.list("items")?, self.one("additionalItems")),
            first => (first, self.one("items")),
        };
        if first.is_some() || rest.is_some() {
            keywords.items = Some(Rc::new(Items { first: first.unwrap_or_default(), rest }));
        }
        keywords.facets.extend(self.count("minItems")?.map(Facet::MinItems));
        keywords.facets.extend(self.count("maxItems")?.map(Facet::MaxItems));
        match self.map.get("uniqueItems") {
            Some(Value::Bool(true)) => keywords.facets.push(Facet::Unique),
            Some(Value::Bool(false)) | None => {}
            Some(_) => return Err(self.bad("uniqueItems", "true or false")),
        }
        if let Some(node) = self.one("contains") {
            let newer = self.document.draft > Draft::Seven;
            let least = self.count("minContains")?.filter(|_| newer).unwrap_or(1);
            let most = self.count("maxContains")?.filter(|_| newer);
            keywords.facets.push(Facet::Contains { node, positive: true, least, most });
        }
        if self.document.draft > Draft::Seven {
            keywords.unevaluated_items = self.one("unevaluatedItems");
        }
        Ok(())
    }

    fn objects(&mut self, keywords: &mut Keywords) -> Result<(), GrammarError> {
        let properties = Properties {
            named: self.named("properties")?,
            patterns: self.named("patternProperties")?,
            additional: self.one("additionalProperties"),
        };
        if !properties.named.is_empty() || !properties.patterns.is_empty() || properties.additional.is_some() {
            keywords.properties = Some(Rc::new(properties));
        }
        keywords.facets.extend(self.count("minProperties")?.map(Facet::MinProperties));
        keywords.facets.extend(self.count("maxProperties")?.map(Facet::MaxProperties));
        if let Some(value) = self.map.get("required") {
            keywords.facets.extend(self.names("required", value)?.into_iter().map(Facet::Required));
        }
        keywords.facets.extend(self.one("propertyNames").map(Facet::Names));
        let newer = self.document.draft > Draft::Seven;
        if newer {
            keywords.unevaluated_properties = self.one("unevaluatedProperties");
            keywords.dependent = self.named("dependentSchemas")?;
        }
        for (keyword, counts) in [("dependentRequired", newer), ("dependencies", true)] {
            let Some(value) = self.map.get(keyword).filter(|_| counts) else { continue };
            let map = value.as_object().ok_or_else(|| self.bad(keyword, "an object"))?;
            for (name, value) in map {
                match value {
                    Value::Array(_) => {
                        let names = self.names(keyword, value)?;
                        keywords.dependent_required.push((name.as_str().into(), names));
                    }
                    _ => {
                        let node = self.part(value, &format!("{keyword}/{name}"));
                        keywords.dependent.push((name.as_str().into(), node));
                    }
                }
            }
        }
        Ok(())
    }
}
