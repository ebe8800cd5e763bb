// Package filetree holds the metadata of a file hierarchy in little memory:
// inodes, the names that lead to them, extended attributes, symbolic links'
// targets and the data maps of sparse files, but no content.
//
// A [Builder] takes the hierarchy in from whoever walks it (package rootfs);
// the [Tree] it makes is what a filesystem writer (package ext4) plans from.
// A tree of two million files takes about 110 bytes a file and its name.
// The package touches nothing outside its memory.
package filetree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/sparse"
)

// ID names an inode of a tree: a small number, counted in the order in which
// inodes were added. The root directory is [Root].
type ID uint32

// Root is the ID of a tree's root directory.
const Root ID = 0

// None is the ID of no inode.
const None ID = math.MaxUint32

// Time is a point in time as the kernel gives it: seconds since 1970
// (negative before) and nanoseconds 0-999,999,999 after that second.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Attr is what stat(2) says of an inode.
type Attr struct {
	Mode         uint32 // type (unix.S_IFMT) and permission bits, as st_mode
	UID, GID     uint32
	Size         int64 // bytes of a regular file, or of a symbolic link's target; else 0
	Mtime        Time
	Ctime        Time   // only to notice change: no writer stores it
	Major, Minor uint32 // device number, of device nodes only
	Dev, Ino     uint64 // where it was found, to recognise it again
	Flags        uint32 // inode flags kept in the image, as FS_IOC_GETFLAGS gives them
}

// Type is the type bits of the mode, one of unix.S_IFREG, S_IFDIR and so on.
func (a *Attr) Type() uint32 { return a.Mode & unix.S_IFMT }

// Xattr is one extended attribute, its name with the namespace ("user.x").
type Xattr struct {
	Name  string
	Value []byte
}

// Errors of a [Builder].
var (
	ErrOrder    = errors.New("entry out of order")
	ErrName     = errors.New("invalid file name")
	ErrTooLarge = errors.New("tree too large")
)

type inode struct {
	size, mtime int64
	ctime       int64 // nanoseconds, wrapped: compared only
	ino         uint64
	mode        uint32
	uid, gid    uint32
	mtimeNsec   uint32
	ctimeNsec   uint32
	major       uint32
	minor       uint32
	flags       uint32
	nlink       uint32 // names in the tree
	entry       uint32 // its first name
	xattrs      uint32 // set number, 0 for none
	aux         uint32 // directory: first entry; symlink: target; regular: data map number, 0 for dense
	count       uint32 // directory: number of entries
	dev         uint32 // number into Tree.devs
}

type entry struct {
	parent  ID
	inode   ID
	name    uint32 // offset in names
	nameLen uint32
}

// Tree is a finished hierarchy. It may be read by several goroutines at once.
type Tree struct {
	inodes  chunked[inode]
	entries chunked[entry]
	text    arena // names and targets
	sets    [][]Xattr
	maps    []sparse.Map
	devs    []uint64
}

// Len is the number of inodes; IDs run from 0 to Len-1.
func (t *Tree) Len() int { return t.inodes.len() }

// Entries is the number of names, the root's not counted.
func (t *Tree) Entries() int { return t.entries.len() }

// Attr returns what was added for an inode.
func (t *Tree) Attr(id ID) Attr {
	n := t.inodes.at(int(id))
	return Attr{
		Mode: n.mode, UID: n.uid, GID: n.gid, Size: n.size,
		Mtime: Time{n.mtime, n.mtimeNsec}, Ctime: Time{n.ctime, n.ctimeNsec},
		Major: n.major, Minor: n.minor, Dev: t.devs[n.dev], Ino: n.ino, Flags: n.flags,
	}
}

// Mode is the type and permission bits of an inode.
func (t *Tree) Mode(id ID) uint32 { return t.inodes.at(int(id)).mode }

// Size is the size of an inode in bytes, as [Attr] has it.
func (t *Tree) Size(id ID) int64 { return t.inodes.at(int(id)).size }

// Names is the number of names an inode has in the tree: more than one for
// hard links. It is 0 only for the root.
func (t *Tree) Names(id ID) int { return int(t.inodes.at(int(id)).nlink) }

// Children yields the names in a directory and the inodes they lead to,
// sorted by the bytes of the name. The name must not be kept or changed.
func (t *Tree) Children(dir ID) iter.Seq2[[]byte, ID] {
	return func(yield func([]byte, ID) bool) {
		n := t.inodes.at(int(dir))
		if n.mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		for i := range n.count {
			e := t.entries.at(int(n.aux + i))
			if !yield(t.text.at(e.name, e.nameLen), e.inode) {
				return
			}
		}
	}
}

// NumChildren is the number of names in a directory.
func (t *Tree) NumChildren(dir ID) int { return int(t.inodes.at(int(dir)).count) }

// Parent is the directory of an inode's first name; the root's is the root.
func (t *Tree) Parent(id ID) ID {
	if id == Root {
		return Root
	}
	return t.entries.at(int(t.inodes.at(int(id)).entry)).parent
}

// Name is an inode's first name, without its directory; the root's is "".
func (t *Tree) Name(id ID) string {
	if id == Root {
		return ""
	}
	e := t.entries.at(int(t.inodes.at(int(id)).entry))
	return string(t.text.at(e.name, e.nameLen))
}

// Path is the path of an inode's first name, relative to the root: "etc/passwd";
// the root's is ".".
func (t *Tree) Path(id ID) string {
	if id == Root {
		return "."
	}
	var parts []string
	for ; id != Root; id = t.Parent(id) {
		parts = append(parts, t.Name(id))
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// Find returns the inode at a path in the form of [Tree.Path], or [None].
// Symbolic links are not followed.
func (t *Tree) Find(path string) ID {
	id := Root
	if path == "." || path == "" {
		return id
	}
	for part := range strings.SplitSeq(path, "/") {
		if id = t.child(id, part); id == None {
			break
		}
	}
	return id
}

// child is a name in a directory, or None.
func (t *Tree) child(dir ID, name string) ID {
	n := t.inodes.at(int(dir))
	if n.mode&unix.S_IFMT != unix.S_IFDIR {
		return None
	}
	lo, hi := 0, int(n.count)
	for lo < hi {
		mid := (lo + hi) / 2
		e := t.entries.at(int(n.aux) + mid)
		switch c := bytes.Compare(t.text.at(e.name, e.nameLen), []byte(name)); {
		case c == 0:
			return e.inode
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return None
}

// Target is a symbolic link's target, 1-4095 bytes.
func (t *Tree) Target(id ID) []byte {
	n := t.inodes.at(int(id))
	if n.mode&unix.S_IFMT != unix.S_IFLNK {
		return nil
	}
	return t.text.at(n.aux, uint32(n.size))
}

// Xattrs are the extended attributes of an inode, sorted by name. They are
// shared between inodes and must not be changed.
func (t *Tree) Xattrs(id ID) []Xattr { return t.sets[t.inodes.at(int(id)).xattrs] }

// XattrSet is the number of an inode's set of extended attributes: inodes with
// equal attributes have the same number. It is 0 for none.
func (t *Tree) XattrSet(id ID) int { return int(t.inodes.at(int(id)).xattrs) }

// XattrSets is the number of sets, the empty one included; numbers run from 0.
func (t *Tree) XattrSets() int { return len(t.sets) }

// Set is the set with a number, as [Tree.Xattrs] gives it.
func (t *Tree) Set(n int) []Xattr { return t.sets[n] }

// Data is the map of a regular file's data; nil for a file of size 0.
func (t *Tree) Data(id ID) sparse.Map {
	n := t.inodes.at(int(id))
	if n.mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	if n.aux == 0 {
		return sparse.Dense(n.size)
	}
	return t.maps[n.aux]
}

// Entry is one name to be added to a directory.
type Entry struct {
	Name string // 1-255 bytes, no '/' and no NUL
	Link ID     // with [None]: a new inode, described by the rest; else one more name for that inode
	Attr
	Target string     // of a symbolic link; sets Size
	Xattrs []Xattr    // in any order
	Data   sparse.Map // of a regular file that has holes; nil for one without
}

// Builder makes a [Tree]. Directories are filled one at a time: after Begin,
// Add the entries in the order of their names' bytes. Each directory is begun
// at most once. A Builder is not for concurrent use.
type Builder struct {
	t     *Tree
	dir   ID
	last  string
	links map[inodeKey]ID
	sets  map[string]uint32
	devs  map[uint64]uint32
}

type inodeKey struct{ dev, ino uint64 }

// NewBuilder starts a tree with its root directory.
func NewBuilder(root Attr, xattrs []Xattr) (*Builder, error) {
	b := &Builder{
		t:    &Tree{sets: [][]Xattr{nil}, maps: []sparse.Map{nil}},
		dir:  None,
		sets: map[string]uint32{"": 0}, devs: map[uint64]uint32{}, links: map[inodeKey]ID{},
	}
	if root.Type() != unix.S_IFDIR {
		return nil, fmt.Errorf("%w: the root is not a directory", ErrName)
	}
	if _, err := b.newInode(&Entry{Link: None, Attr: root, Xattrs: xattrs}); err != nil {
		return nil, err
	}
	return b, nil
}

// Begin makes dir the directory that Add adds to.
func (b *Builder) Begin(dir ID) error {
	n := b.t.inodes.at(int(dir))
	if n.mode&unix.S_IFMT != unix.S_IFDIR || n.count != 0 {
		return fmt.Errorf("%w: %q cannot be begun (again)", ErrOrder, b.t.Path(dir))
	}
	n.aux = uint32(b.t.entries.len())
	b.dir, b.last = dir, ""
	return nil
}

// Add adds a name to the directory begun last and returns the inode it leads to.
func (b *Builder) Add(e *Entry) (ID, error) {
	switch {
	case len(e.Name) == 0 || len(e.Name) > 255 || strings.ContainsAny(e.Name, "/\x00") || e.Name == "." || e.Name == "..":
		return None, fmt.Errorf("%w: %q", ErrName, e.Name)
	case b.dir == None:
		return None, fmt.Errorf("%w: no directory was begun", ErrOrder)
	case e.Name <= b.last:
		return None, fmt.Errorf("%w: %q after %q", ErrOrder, e.Name, b.last)
	case b.t.entries.len() >= math.MaxUint32-1:
		return None, fmt.Errorf("%w: more than %d names", ErrTooLarge, uint32(math.MaxUint32-1))
	}
	id := e.Link
	if id == None {
		var err error
		if id, err = b.newInode(e); err != nil {
			return None, fmt.Errorf("adding %q: %w", e.Name, err)
		}
	}
	n := b.t.inodes.at(int(id))
	if e.Link != None && n.mode&unix.S_IFMT == unix.S_IFDIR {
		return None, fmt.Errorf("%w: %q would be a second name of a directory", ErrName, e.Name)
	}
	name, err := b.t.text.add(e.Name)
	if err != nil {
		return None, err
	}
	if n.nlink == 0 {
		n.entry = uint32(b.t.entries.len())
	}
	n.nlink++
	b.t.entries.add(entry{parent: b.dir, inode: id, name: name, nameLen: uint32(len(e.Name))})
	b.t.inodes.at(int(b.dir)).count++
	b.last = e.Name
	return id, nil
}

// Linked returns the inode that was added with [Builder.Remember] for dev and
// ino, or [None].
func (b *Builder) Linked(dev, ino uint64) ID {
	if id, ok := b.links[inodeKey{dev, ino}]; ok {
		return id
	}
	return None
}

// Remember lets a later [Builder.Linked] find id: for files with more than one link.
func (b *Builder) Remember(dev, ino uint64, id ID) { b.links[inodeKey{dev, ino}] = id }

// Peek gives the tree as far as it is built, for paths in messages.
func (b *Builder) Peek() *Tree { return b.t }

// Tree ends the building and returns the tree.
func (b *Builder) Tree() *Tree {
	t := b.t
	*b = Builder{}
	return t
}

func (b *Builder) newInode(e *Entry) (ID, error) {
	if b.t.inodes.len() >= math.MaxUint32-16 {
		return None, fmt.Errorf("%w: more than %d inodes", ErrTooLarge, uint32(math.MaxUint32-16))
	}
	n := inode{
		size: e.Size, mtime: e.Mtime.Sec, mtimeNsec: e.Mtime.Nsec, ctime: e.Ctime.Sec, ctimeNsec: e.Ctime.Nsec,
		ino: e.Ino, mode: e.Mode, uid: e.UID, gid: e.GID, major: e.Major, minor: e.Minor, flags: e.Flags,
	}
	dev, ok := b.devs[e.Dev]
	if !ok {
		dev = uint32(len(b.t.devs))
		b.t.devs = append(b.t.devs, e.Dev)
		b.devs[e.Dev] = dev
	}
	n.dev = dev
	switch e.Type() {
	case unix.S_IFREG:
		if e.Size < 0 {
			return None, fmt.Errorf("%w: size %d", ErrName, e.Size)
		}
		if e.Data != nil || e.Size == 0 {
			if err := e.Data.Check(e.Size); err != nil {
				return None, err
			}
		}
		if e.Data != nil && !slices.Equal(e.Data, sparse.Dense(e.Size)) {
			n.aux = uint32(len(b.t.maps))
			b.t.maps = append(b.t.maps, slices.Clip(e.Data))
		}
	case unix.S_IFLNK:
		if len(e.Target) == 0 || len(e.Target) > 4095 {
			return None, fmt.Errorf("%w: symbolic link target of %d bytes", ErrName, len(e.Target))
		}
		n.size = int64(len(e.Target))
		var err error
		if n.aux, err = b.t.text.add(e.Target); err != nil {
			return None, err
		}
	case unix.S_IFDIR, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		n.size = 0
	default:
		return None, fmt.Errorf("%w: file type %#o", ErrName, e.Type())
	}
	n.xattrs = b.set(e.Xattrs)
	b.t.inodes.add(n)
	return ID(b.t.inodes.len() - 1), nil
}

// set finds or adds a set of extended attributes: most files of a system
// share a handful (security labels).
func (b *Builder) set(xs []Xattr) uint32 {
	if len(xs) == 0 {
		return 0
	}
	xs = slices.Clone(xs)
	slices.SortFunc(xs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	var key []byte
	for _, x := range xs {
		key = binary.AppendUvarint(key, uint64(len(x.Name)))
		key = append(key, x.Name...)
		key = binary.AppendUvarint(key, uint64(len(x.Value)))
		key = append(key, x.Value...)
	}
	if n, ok := b.sets[string(key)]; ok {
		return n
	}
	n := uint32(len(b.t.sets))
	for i := range xs {
		xs[i].Value = bytes.Clone(xs[i].Value)
	}
	b.t.sets = append(b.t.sets, xs)
	b.sets[string(key)] = n
	return n
}
