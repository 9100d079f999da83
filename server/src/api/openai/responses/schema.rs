//! Schemas of fields that are parsed by hand.

use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, SchemaType, Type};

fn of(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(kind)
}

/// Any JSON.
pub fn any() -> Schema {
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).into()
}

/// A list of anything, or null.
pub fn list() -> Schema {
    let list = ArrayBuilder::new().items(ObjectBuilder::new().schema_type(SchemaType::AnyValue));
    OneOfBuilder::new().item(list).item(of(Type::Null)).into()
}

/// An object.
pub fn object() -> Schema {
    of(Type::Object).into()
}

/// An object, or null.
pub fn object_or_null() -> Schema {
    ObjectBuilder::new().schema_type(SchemaType::from_iter([Type::Object, Type::Null])).into()
}

/// Null.
pub fn null() -> Schema {
    of(Type::Null).into()
}

/// A list of objects, or null.
pub fn objects() -> Schema {
    let list = ArrayBuilder::new().items(of(Type::Object));
    OneOfBuilder::new().item(list).item(of(Type::Null)).into()
}

/// A text, or a list of items.
pub fn input() -> Schema {
    let list = ArrayBuilder::new().items(of(Type::Object));
    OneOfBuilder::new().item(of(Type::String)).item(list).item(of(Type::Null)).into()
}

/// A word or an object.
pub fn tool_choice() -> Schema {
    let words = of(Type::String).enum_values(Some(["auto", "none", "required"]));
    OneOfBuilder::new().item(words).item(of(Type::Object)).item(of(Type::Null)).into()
}
