//! Pickles as data: the values that a pickle describes, without running anything it asks for.
//!
//! Python's own loader calls whatever functions a pickle names. This one knows a handful of them
//! (tensors, ordered dictionaries, bytes) and keeps every other class as an opaque [`Object`].

mod machine;

use std::sync::Arc;

pub(super) use machine::Loaded;
use safetensors::Dtype;

/// Deepest nesting of values that is read.
const MAX_DEPTH: usize = 100;
/// Most values that one walk over a tree visits: shared values count each time they are met, which
/// is what stops a small file that stands for an enormous tree.
const MAX_VISITS: usize = 1 << 20;

/// Why a pickle cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pickle, byte {at}: {problem}")]
pub struct PickleError {
    /// Bytes read when the problem showed.
    pub at: u64,
    /// What is wrong.
    pub problem: String,
}

/// A value of a pickle. Cloning shares the contents.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A wider integer: two's complement, little-endian.
    BigInt(Arc<[u8]>),
    /// A float.
    Float(f64),
    /// Text.
    Str(Arc<str>),
    /// Bytes.
    Bytes(Arc<[u8]>),
    /// A list or a set.
    List(Arc<[Value]>),
    /// A tuple.
    Tuple(Arc<[Value]>),
    /// A dictionary in insertion order; keys are any values.
    Dict(Arc<[(Value, Value)]>),
    /// A class or function by its full name, such as `torch.float32`. It is never imported.
    Global(Arc<str>),
    /// An instance of a class that this reader does not know.
    Object(Arc<Object>),
    /// A PyTorch storage, whose bytes lie outside the pickle.
    Storage(Arc<StorageRef>),
    /// A PyTorch tensor: a view of a storage.
    Tensor(Arc<TensorRef>),
}

/// An instance of an unknown class, such as an `argparse.Namespace`: what it would be made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Full name of the class or of the function that makes it.
    pub class: Arc<str>,
    /// Arguments of the call.
    pub args: Value,
    /// What `__setstate__` would get; for most classes the dictionary of attributes.
    pub state: Value,
    /// Items, for subclasses of list.
    pub items: Vec<Value>,
    /// Entries, for subclasses of dict.
    pub entries: Vec<(Value, Value)>,
}

/// A PyTorch storage: a run of elements under a key of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageRef {
    /// Its class, such as `torch.FloatStorage`.
    pub class: Arc<str>,
    /// Element type, where the class says it and safetensors has it.
    pub dtype: Option<Dtype>,
    /// Its key in the file.
    pub key: Arc<str>,
    /// Length in elements (in bytes for untyped storages).
    pub elements: u64,
    /// Where a view of this storage begins, in elements (old files only).
    pub view_offset: u64,
}

/// A PyTorch tensor, as a view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorRef {
    /// Where the elements are.
    pub storage: Arc<StorageRef>,
    /// Element type; None where safetensors has no such type.
    pub dtype: Option<Dtype>,
    /// First element, counted in the storage.
    pub offset: u64,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements between neighbours along each dimension.
    pub stride: Vec<u64>,
}

impl Value {
    /// The entry or attribute of that name, in a dictionary or an object.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.find(|k| matches!(k, Value::Str(s) if &**s == key))
    }

    /// The entry under an integer key.
    pub fn get_int(&self, key: i64) -> Option<&Value> {
        self.find(|k| *k == Value::Int(key))
    }

    fn find(&self, wanted: impl Fn(&Value) -> bool) -> Option<&Value> {
        // The last of equal keys wins, as in Python.
        self.entry_slices().into_iter().flatten().rev().find(|(k, _)| wanted(k)).map(|(_, v)| v)
    }

    /// Entries of a dictionary, or entries and attributes of an object, in order.
    pub fn entries(&self) -> impl Iterator<Item = &(Value, Value)> {
        self.entry_slices().into_iter().flatten()
    }

    fn entry_slices(&self) -> [&[(Value, Value)]; 2] {
        match self {
            Value::Dict(entries) => [entries, &[]],
            Value::Object(object) => match &object.state {
                Value::Dict(attributes) => [&object.entries, attributes],
                _ => [&object.entries, &[]],
            },
            _ => [&[], &[]],
        }
    }

    /// Items of a list, set or tuple.
    pub fn items(&self) -> &[Value] {
        match self {
            Value::List(items) | Value::Tuple(items) => items,
            Value::Object(object) => &object.items,
            _ => &[],
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::Str(s) = self { Some(s) } else { None }
    }

    /// An integer (or a Boolean, as in Python).
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Value::Int(i) => Some(*i),
            Value::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    /// A number as a float.
    pub fn as_f64(&self) -> Option<f64> {
        if let Value::Float(f) = self { Some(*f) } else { self.as_int().map(|i| i as f64) }
    }

    /// A word for messages.
    pub fn kind(&self) -> &str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a Boolean",
            Value::Int(_) | Value::BigInt(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Str(_) => "a string",
            Value::Bytes(_) => "bytes",
            Value::List(_) => "a list",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dictionary",
            Value::Global(_) => "a class",
            Value::Object(object) => &object.class,
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }

    /// Every tensor below this value with its path, keys joined by dots: dictionaries by key,
    /// objects by attribute, lists and tuples by position. Other values are passed over.
    ///
    /// # Errors
    /// The tree has more than about a million values.
    pub fn tensors(&self) -> Result<Vec<(String, Arc<TensorRef>)>, String> {
        let mut found = Vec::new();
        walk(self, &mut String::new(), &mut { MAX_VISITS }, &mut found)?;
        Ok(found)
    }

    /// This value as JSON, for the record: tensors, classes and bytes become short descriptions.
    ///
    /// # Errors
    /// The tree has more than about a million values.
    pub fn to_json(&self) -> Result<serde_json::Value, String> {
        json(self, &mut { MAX_VISITS })
    }
}

fn count(visits: &mut usize) -> Result<(), String> {
    *visits = visits.checked_sub(1).ok_or("it stands for more than a million values")?;
    Ok(())
}

fn walk(
    value: &Value,
    path: &mut String,
    visits: &mut usize,
    found: &mut Vec<(String, Arc<TensorRef>)>,
) -> Result<(), String> {
    count(visits)?;
    if let Value::Tensor(tensor) = value {
        found.push((path.clone(), tensor.clone()));
        return Ok(());
    }
    let mut descend = |key: &str, child: &Value, visits: &mut usize| {
        let length = path.len();
        if length > 0 {
            path.push('.');
        }
        path.push_str(key);
        // A path of nested long keys could outgrow the file that it comes from.
        if path.len() > 4096 {
            return Err("a tensor's name is longer than 4096 bytes".to_owned());
        }
        walk(child, path, visits, found)?;
        path.truncate(length);
        Ok(())
    };
    for (key, child) in value.entries() {
        match key {
            Value::Str(key) => descend(key, child, visits)?,
            Value::Int(key) => descend(&key.to_string(), child, visits)?,
            _ => count(visits)?,
        }
    }
    for (position, child) in value.items().iter().enumerate() {
        descend(&position.to_string(), child, visits)?;
    }
    Ok(())
}

fn json(value: &Value, visits: &mut usize) -> Result<serde_json::Value, String> {
    count(visits)?;
    let list = |items: &[Value], visits: &mut usize| -> Result<serde_json::Value, String> {
        items.iter().map(|v| json(v, visits)).collect()
    };
    Ok(match value {
        Value::None => serde_json::Value::Null,
        Value::Bool(b) => (*b).into(),
        Value::Int(i) => (*i).into(),
        Value::Float(f) if f.is_finite() => (*f).into(),
        Value::Float(f) => f.to_string().into(),
        // Long texts met many times would outgrow the file.
        Value::Str(s) => s.chars().take(4096).collect::<String>().into(),
        Value::List(items) | Value::Tuple(items) => list(items, visits)?,
        Value::Dict(_) => object_json(value, visits)?,
        Value::Object(o) if matches!(o.state, Value::Dict(_)) || !o.entries.is_empty() => {
            object_json(value, visits)?
        }
        Value::Object(o) => format!("<{}>", o.class).into(),
        Value::Global(name) => format!("<{name}>").into(),
        Value::BigInt(_) | Value::Bytes(_) | Value::Storage(_) | Value::Tensor(_) => {
            format!("<{}>", value.kind()).into()
        }
    })
}

fn object_json(value: &Value, visits: &mut usize) -> Result<serde_json::Value, String> {
    let mut map = serde_json::Map::new();
    for (key, child) in value.entries() {
        let key = match key {
            Value::Str(s) => s.chars().take(4096).collect(),
            other => json(other, visits)?.to_string(),
        };
        map.insert(key, json(child, visits)?);
    }
    Ok(map.into())
}
