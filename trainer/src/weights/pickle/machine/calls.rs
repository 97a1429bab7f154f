//! Classes and functions that a pickle names: the few that are known here, and opaque objects for
//! all others.

use std::io::BufRead;
use std::sync::Arc;

use safetensors::Dtype;

use super::{Id, MAX_CLASS, MAX_NODES, MAX_RANK, Machine, NONE, Node, ObjectNode, Step};
use crate::weights::pickle::{PickleError, StorageRef, TensorRef, Value};

impl<R: BufRead> Machine<R> {
    pub(super) fn global(&mut self, module: &str, name: &str) -> Step<()> {
        // Names can be repeated by reference; without a limit they would outgrow the file.
        if module.len() + name.len() > MAX_CLASS {
            return self.error("the name of a class is too long");
        }
        self.leaf(Value::Global(format!("{module}.{name}").into()))
    }

    pub(super) fn opaque(&mut self, class: Arc<str>, args: Id) -> Step<()> {
        let object = ObjectNode { class, args, state: NONE, items: Vec::new(), entries: Vec::new() };
        self.push(Node::Object(Box::new(object)))
    }

    /// What a call would make, for the functions known here; an opaque object for all others.
    pub(super) fn call(&mut self, callable: Id, args: Id) -> Step<()> {
        let Node::Leaf(Value::Global(class)) = self.node(callable) else {
            return self.opaque("a call of an object".into(), args);
        };
        let class = class.clone();
        let Node::Tuple(arguments) = self.node(args) else {
            return self.error(format!("{class} is called without a tuple of arguments"));
        };
        match (&*class, arguments.as_slice()) {
            ("collections.OrderedDict", []) => self.push(Node::Dict(Vec::new())),
            ("collections.OrderedDict", &[list]) => self.ordered(list),
            ("torch.Size", &[shape]) => self.push_id(shape),
            (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                &[data, ..],
            ) => self.push_id(data),
            (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                &[storage, offset, shape, stride, ..],
            ) => self.tensor(storage, offset, shape, stride, None),
            ("torch._utils._rebuild_tensor_v3", &[storage, offset, shape, stride, _, _, dtype, ..]) => {
                self.tensor(storage, offset, shape, stride, Some(dtype))
            }
            // A subclass of Tensor, or a tensor with attributes: (function, type, arguments, state).
            ("torch._tensor._rebuild_from_type_v2", &[function, _, inner, ..]) => match self.node(function) {
                Node::Leaf(Value::Global(f)) if f.starts_with("torch._utils._rebuild_") => {
                    self.call(function, inner)
                }
                _ => self.opaque(class, args),
            },
            _ => self.opaque(class, args),
        }
    }

    /// Python 2 gives an ordered dictionary its entries as a list of pairs.
    fn ordered(&mut self, list: Id) -> Step<()> {
        let pair = |&id: &Id| match self.node(id) {
            Node::Tuple(pair) | Node::List(pair) => {
                pair.as_slice().try_into().ok().map(|&[k, v]: &[Id; 2]| (k, v))
            }
            _ => None,
        };
        let mut copied = self.copied;
        let entries: Option<Vec<_>> = match self.node(list) {
            // One list can be given to many dictionaries; their sum must stay bounded.
            Node::List(items) if copied + items.len() <= MAX_NODES => {
                copied += items.len();
                items.iter().map(pair).collect()
            }
            _ => None,
        };
        self.copied = copied;
        match entries {
            Some(entries) => self.push(Node::Dict(entries)),
            None => self.error("an ordered dictionary is not made from a list of pairs"),
        }
    }

    fn int(&self, id: Id) -> Step<u64> {
        match self.node(id) {
            Node::Leaf(Value::Int(i)) if *i >= 0 => Ok(*i as u64),
            _ => self.error("a tensor's size, stride or offset is not a natural number"),
        }
    }

    fn ints(&self, id: Id) -> Step<Vec<u64>> {
        match self.node(id) {
            Node::Tuple(items) | Node::List(items) if items.len() <= MAX_RANK => {
                items.iter().map(|&i| self.int(i)).collect()
            }
            _ => self.error("a tensor's shape or stride is no tuple of at most 16 numbers"),
        }
    }

    fn tensor(&mut self, storage: Id, offset: Id, shape: Id, stride: Id, dtype: Option<Id>) -> Step<()> {
        let Node::Leaf(Value::Storage(storage)) = self.node(storage) else {
            return self.error("a tensor without a storage");
        };
        let storage = storage.clone();
        let dtype = match dtype.map(|id| self.node(id)) {
            None => storage.dtype,
            Some(Node::Leaf(Value::Global(name))) => dtype_by_name(name),
            Some(_) => return self.error("a tensor's element type is no class"),
        };
        let Some(offset) = self.int(offset)?.checked_add(storage.view_offset) else {
            return self.error("a tensor's offset is too large");
        };
        let (shape, stride) = (self.ints(shape)?, self.ints(stride)?);
        if shape.len() != stride.len() {
            return self.error("a tensor's shape and stride differ in length");
        }
        let shape = shape.into_iter().map(|d| d as usize).collect();
        self.leaf(Value::Tensor(Arc::new(TensorRef { storage, dtype, offset, shape, stride })))
    }

    /// ("storage", class, key, location, elements[, None | (view key, offset, size)])
    pub(super) fn persistent(&mut self, id: Id) -> Step<()> {
        let Node::Tuple(parts) = self.node(id) else {
            return self.opaque("persistent id".into(), id);
        };
        let (Some(&tag), Some(&class), Some(&key), Some(&elements)) =
            (parts.first(), parts.get(1), parts.get(2), parts.get(4))
        else {
            return self.opaque("persistent id".into(), id);
        };
        let view = parts.get(5).copied().unwrap_or(NONE);
        let (Node::Leaf(Value::Str(tag)), Node::Leaf(Value::Global(class)), Node::Leaf(Value::Str(key))) =
            (self.node(tag), self.node(class), self.node(key))
        else {
            return self.opaque("persistent id".into(), id);
        };
        if &**tag != "storage" {
            return self.opaque("persistent id".into(), id);
        }
        let (class, key) = (class.clone(), key.clone());
        let elements = self.int(elements)?;
        let view_offset = match self.node(view) {
            Node::Tuple(parts) if parts.len() == 3 => self.int(parts[1])?,
            _ => 0,
        };
        let dtype = dtype_by_storage(&class);
        let root = StorageRef { class, dtype, key: key.clone(), elements, view_offset: 0 };
        let known = self.storages.entry(key).or_insert_with(|| Arc::new(root.clone()));
        if **known != root {
            let key = &root.key;
            return Err(PickleError {
                at: self.at,
                problem: format!("storage {key} is described in two ways"),
            });
        }
        let storage =
            if view_offset == 0 { known.clone() } else { Arc::new(StorageRef { view_offset, ..root }) };
        self.leaf(Value::Storage(storage))
    }
}

fn dtype_by_storage(class: &str) -> Option<Dtype> {
    Some(match class.rsplit('.').next()? {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        "ComplexFloatStorage" => Dtype::C64,
        _ => return None,
    })
}

fn dtype_by_name(name: &str) -> Option<Dtype> {
    Some(match name.strip_prefix("torch.")? {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "bool" => Dtype::BOOL,
        "complex64" => Dtype::C64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        _ => return None,
    })
}
