//! The pickle machine: opcodes of protocols 0 to 5 over a stack of values.
//!
//! Values under construction live in an arena and refer to each other by number, so that shared and
//! even cyclic values cost what the file says and no more. At the end the tree below the top of the
//! stack is turned into [`Value`]s; a cycle is an error.

mod calls;
mod stack;

use std::collections::HashMap;
use std::io::BufRead;
use std::sync::Arc;

use super::{MAX_DEPTH, Object, PickleError, StorageRef, Value};

/// Most values in one pickle.
const MAX_NODES: usize = 1 << 20;
/// Longest line of the text opcodes, and longest name of a class.
const MAX_LINE: usize = 1 << 16;
const MAX_CLASS: usize = 512;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 16;

type Id = u32;

const NONE: Id = 0;
const TRUE: Id = 1;
const FALSE: Id = 2;
const EMPTY_TUPLE: Id = 3;

/// A value under construction.
enum Node {
    Leaf(Value),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Object(Box<ObjectNode>),
}

struct ObjectNode {
    class: Arc<str>,
    args: Id,
    state: Id,
    items: Vec<Id>,
    entries: Vec<(Id, Id)>,
}

/// A pickle that has been read.
pub(in crate::weights) struct Loaded {
    /// What it stands for.
    pub value: Value,
    /// The storages that it names, by key.
    pub storages: HashMap<Arc<str>, Arc<StorageRef>>,
    /// How many bytes it took.
    pub bytes: u64,
}

impl Loaded {
    /// Reads one pickle, up to and including its STOP.
    pub fn read(reader: impl BufRead) -> Result<Self, PickleError> {
        let mut machine = Machine {
            reader,
            at: 0,
            nodes: vec![
                Node::Leaf(Value::None),
                Node::Leaf(Value::Bool(true)),
                Node::Leaf(Value::Bool(false)),
                Node::Tuple(Vec::new()),
            ],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            storages: HashMap::new(),
            copied: 0,
        };
        let top = machine.run()?;
        let mut values: Vec<Option<(Value, usize)>> = vec![None; machine.nodes.len()];
        let (value, _) = machine.value(top, 0, &mut values)?;
        Ok(Self { value, storages: machine.storages, bytes: machine.at })
    }
}

struct Machine<R> {
    reader: R,
    at: u64,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    storages: HashMap<Arc<str>, Arc<StorageRef>>,
    copied: usize,
}

type Step<T> = Result<T, PickleError>;

impl<R: BufRead> Machine<R> {
    fn error<T>(&self, problem: impl Into<String>) -> Step<T> {
        Err(PickleError { at: self.at, problem: problem.into() })
    }

    fn run(&mut self) -> Step<Id> {
        loop {
            let opcode = self.u8()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let version = self.u8()?;
                    if version > 5 {
                        return self.error(format!("pickle protocol {version} is not known"));
                    }
                }
                0x95 => drop(self.u64()?),
                b'(' => {
                    if self.marks.len() >= MAX_NODES {
                        return self.error("too many marks");
                    }
                    self.marks.push(self.stack.len());
                }
                b'0' => {
                    // POP takes a mark where nothing lies above it.
                    match self.marks.last() {
                        Some(&mark) if mark == self.stack.len() => drop(self.marks.pop()),
                        _ => drop(self.pop()?),
                    }
                }
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let id = self.top()?;
                    self.push_id(id)?;
                }
                _ => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            b'N' => self.push_id(NONE),
            0x88 => self.push_id(TRUE),
            0x89 => self.push_id(FALSE),
            b'I' | b'L' | b'F' | b'S' | b'V' => self.text_scalar(opcode),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.leaf(Value::Int(value.into()))
            }
            b'K' => {
                let value = self.u8()?;
                self.leaf(Value::Int(value.into()))
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.leaf(Value::Int(value.into()))
            }
            0x8a => {
                let length = self.u8()?;
                self.long(length.into())
            }
            0x8b => {
                let length = self.u32()?;
                self.long(length.into())
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.leaf(Value::Float(value))
            }
            // Strings and bytes: a length of 1, 4 or 8 bytes, then the contents.
            b'U' | b'T' | b'X' | 0x8c | 0x8d | b'C' | b'B' | 0x8e | 0x96 => {
                let length = match opcode {
                    b'U' | 0x8c | b'C' => self.u8()?.into(),
                    b'T' | b'X' | b'B' => self.u32()?.into(),
                    _ => self.u64()?,
                };
                let bytes = self.bytes(length)?;
                match opcode {
                    b'U' | b'T' => self.old_string(bytes),
                    b'X' | 0x8c | 0x8d => self.text(bytes),
                    _ => self.leaf(Value::Bytes(bytes.into())),
                }
            }
            b']' | 0x8f => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b')' => self.push_id(EMPTY_TUPLE),
            b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Node::List(items))
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items))
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x85..=opcode {
                    items.insert(0, self.pop()?);
                }
                self.push(Node::Tuple(items))
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                let entries = self.pairs(&items)?;
                self.push(Node::Dict(entries))
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.extend(items)
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(vec![(key, value)])
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                let entries = self.pairs(&items)?;
                self.insert(entries)
            }
            b'p' | b'q' | b'r' | 0x94 => {
                let key = match opcode {
                    b'p' => self.line_number()?,
                    b'q' => self.u8()?.into(),
                    b'r' => self.u32()?,
                    _ => self.memo.len() as u32,
                };
                let id = self.top()?;
                self.memo.insert(key, id);
                Ok(())
            }
            b'g' | b'h' | b'j' => {
                let key = match opcode {
                    b'g' => self.line_number()?,
                    b'h' => self.u8()?.into(),
                    _ => self.u32()?,
                };
                match self.memo.get(&key) {
                    Some(&id) => self.push_id(id),
                    None => self.error(format!("refers to value {key}, which was never stored")),
                }
            }
            b'c' | b'i' => {
                let module = self.line()?;
                let name = self.line()?;
                self.global(&module, &name)?;
                if opcode == b'i' {
                    let class = self.pop()?;
                    let items = self.pop_to_mark()?;
                    let args = self.add(Node::Tuple(items))?;
                    self.call(class, args)?;
                }
                Ok(())
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.node(module), self.node(name)) {
                    (Node::Leaf(Value::Str(module)), Node::Leaf(Value::Str(name))) => {
                        let (module, name) = (module.clone(), name.clone());
                        self.global(&module, &name)
                    }
                    _ => self.error("the name of a class is not a string"),
                }
            }
            // REDUCE and NEWOBJ: call a class or function with a tuple of arguments.
            b'R' | 0x81 => {
                let (args, class) = (self.pop()?, self.pop()?);
                self.call(class, args)
            }
            0x92 => {
                let (_keywords, args, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(class, args)
            }
            b'o' => {
                let mut items = self.pop_to_mark()?;
                if items.is_empty() {
                    return self.error("an object without a class");
                }
                let class = items.remove(0);
                let args = self.add(Node::Tuple(items))?;
                self.call(class, args)
            }
            b'b' => {
                let (state, target) = (self.pop()?, self.top()?);
                if let Node::Object(object) = &mut self.nodes[target as usize] {
                    object.state = state;
                }
                // Attributes of dictionaries and tensors (`_metadata`, hooks) carry no weights.
                Ok(())
            }
            b'P' => {
                let line = self.line()?;
                let args = self.add(Node::Leaf(Value::Str(line.into())))?;
                self.opaque("persistent id".into(), args)
            }
            b'Q' => {
                let id = self.pop()?;
                self.persistent(id)
            }
            0x82..=0x84 => self.error("uses the extension registry, which a file cannot carry"),
            0x97 | 0x98 => self.error("refers to buffers outside the file"),
            other => self.error(format!("byte {other:#04x} is no pickle opcode")),
        }
    }

    fn line_number(&mut self) -> Step<u32> {
        let line = self.line()?;
        line.trim().parse().or_else(|_| self.error(format!("{line:?} is not a number")))
    }

    fn text_scalar(&mut self, opcode: u8) -> Step<()> {
        let line = self.line()?;
        match opcode {
            b'I' if line == "00" => self.push_id(FALSE),
            b'I' if line == "01" => self.push_id(TRUE),
            b'I' | b'L' => match line.trim().trim_end_matches('L').parse() {
                Ok(value) => self.leaf(Value::Int(value)),
                Err(_) => self.error(format!("{line:?} is not a 64-bit integer")),
            },
            b'F' => match line.trim().parse() {
                Ok(value) => self.leaf(Value::Float(value)),
                Err(_) => self.error(format!("{line:?} is not a float")),
            },
            b'S' => {
                let quoted = line.trim();
                let inner = ['\'', '"']
                    .iter()
                    .find_map(|&q| quoted.strip_prefix(q).and_then(|s| s.strip_suffix(q)))
                    .map(str::to_owned);
                match inner {
                    Some(inner) => self.leaf(Value::Str(inner.into())),
                    None => self.error("a string lacks its quotes"),
                }
            }
            _ => self.leaf(Value::Str(line.into())),
        }
    }

    fn long(&mut self, length: u64) -> Step<()> {
        let bytes = self.bytes(length)?;
        if bytes.len() > 8 {
            return self.leaf(Value::BigInt(bytes.into()));
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(&bytes);
        self.leaf(Value::Int(i64::from_le_bytes(wide)))
    }

    fn extend(&mut self, items: Vec<Id>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target as usize] {
            Node::List(list) => list.extend(items),
            Node::Object(object) => object.items.extend(items),
            _ => return self.error("adds items to something that is no list"),
        }
        Ok(())
    }

    fn insert(&mut self, entries: Vec<(Id, Id)>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target as usize] {
            Node::Dict(dict) => dict.extend(entries),
            Node::Object(object) => object.entries.extend(entries),
            _ => return self.error("adds entries to something that is no dictionary"),
        }
        Ok(())
    }

    /// The tree below a node, and its height. `values` holds what is done already.
    fn value(&self, id: Id, depth: usize, values: &mut [Option<(Value, usize)>]) -> Step<(Value, usize)> {
        // Also what ends a walk round a cycle.
        if depth > MAX_DEPTH {
            return self.error(format!("values are nested deeper than {MAX_DEPTH}, or contain themselves"));
        }
        if let Some(done) = &values[id as usize] {
            return Ok(done.clone());
        }
        let mut height = 0;
        let mut child = |id: Id| -> Step<Value> {
            let (value, h) = self.value(id, depth + 1, values)?;
            height = height.max(h + 1);
            Ok(value)
        };
        let value = match self.node(id) {
            Node::Leaf(value) => value.clone(),
            Node::List(items) => Value::List(items.iter().map(|&i| child(i)).collect::<Step<_>>()?),
            Node::Tuple(items) => Value::Tuple(items.iter().map(|&i| child(i)).collect::<Step<_>>()?),
            Node::Dict(entries) => {
                Value::Dict(entries.iter().map(|&(k, v)| Ok((child(k)?, child(v)?))).collect::<Step<_>>()?)
            }
            Node::Object(o) => Value::Object(Arc::new(Object {
                class: o.class.clone(),
                args: child(o.args)?,
                state: child(o.state)?,
                items: o.items.iter().map(|&i| child(i)).collect::<Step<_>>()?,
                entries: o.entries.iter().map(|&(k, v)| Ok((child(k)?, child(v)?))).collect::<Step<_>>()?,
            })),
        };
        // A shared value met at a small depth may be tall: without this, height has no bound, and
        // dropping the tree would overflow the stack.
        if height > MAX_DEPTH {
            return self.error(format!("values are nested deeper than {MAX_DEPTH}"));
        }
        values[id as usize] = Some((value.clone(), height));
        Ok((value, height))
    }
}
