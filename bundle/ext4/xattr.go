package ext4

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/instar-image/instar/bundle/filetree"
)

// Errors of [Warning]s about extended attributes.
var (
	ErrXattrName  = errors.New("ext4 has no such namespace of attributes")
	ErrXattrSize  = errors.New("attribute too large")
	ErrXattrSpace = errors.New("no room for the attribute")
)

const (
	maxXattr       = 65536 // bytes of a value the kernel gives or takes
	inodeXattrRoom = inodeSize - 160 - 4 - 4
	blockXattrRoom = BlockSize - 32 - 4
	// xattrUses is how many inodes may share an attribute block
	// (EXT4_XATTR_REFCOUNT_MAX).
	xattrUses = 1024
)

// xattr is an attribute as ext4 stores it.
type xattr struct {
	prefix byte
	name   string // without prefix
	value  []byte
	nr     int // of its value inode within the set, -1 without
}

func (x *xattr) size() int {
	n := 16 + (len(x.name)+3)&^3
	if x.nr < 0 {
		n += (len(x.value) + 3) &^ 3
	}
	return n
}

var xattrPrefixes = []struct {
	name string
	nr   byte
}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}, {"system.", 7}}

func newXattr(x *filetree.Xattr) (xattr, error) {
	if len(x.Value) > maxXattr {
		return xattr{}, fmt.Errorf("%w: %s has %d bytes", ErrXattrSize, x.Name, len(x.Value))
	}
	for i, n := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		if x.Name == n {
			v, err := storedACL(x.Value)
			if err != nil {
				return xattr{}, fmt.Errorf("%s: %w", x.Name, err)
			}
			return xattr{prefix: byte(2 + i), value: v, nr: -1}, nil
		}
	}
	for _, p := range xattrPrefixes {
		name, ok := strings.CutPrefix(x.Name, p.name)
		if ok && name != "" && len(name) <= 255 && x.Name != "system.data" {
			return xattr{prefix: p.nr, name: name, value: x.Value, nr: -1}, nil
		}
	}
	return xattr{}, fmt.Errorf("%w: %s", ErrXattrName, x.Name)
}

// packedSet is how a set of attributes is stored.
type packedSet struct {
	inode, block []xattr
	values       []xattr // that are in inodes of their own
	lost         []error
}

// packSet distributes a set: what fits into the inode, security labels and
// ACLs first; then one block; and the largest values into inodes of their own
// as far as the block does not hold them.
func packSet(set []filetree.Xattr) (s packedSet) {
	all := make([]xattr, 0, len(set))
	for i := range set {
		x, err := newXattr(&set[i])
		if err != nil {
			s.lost = append(s.lost, err)
			continue
		}
		all = append(all, x)
	}
	urgency := func(x *xattr) int {
		switch x.prefix {
		case 6:
			return 0
		case 2, 3:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b xattr) int { return cmp.Compare(urgency(&a), urgency(&b)) })
	room := inodeXattrRoom
	for _, x := range all {
		if n := x.size(); n <= room {
			room -= n
			s.inode = append(s.inode, x)
		} else {
			s.block = append(s.block, x)
		}
	}
	total := 0
	for i := range s.block {
		total += s.block[i].size()
	}
	for total > blockXattrRoom {
		most := -1
		for i, x := range s.block {
			if x.nr < 0 && len(x.value) > 0 && (most < 0 || len(x.value) > len(s.block[most].value)) {
				most = i
			}
		}
		if most < 0 { // the names alone are too many
			last := s.block[len(s.block)-1]
			s.block = s.block[:len(s.block)-1]
			total -= last.size()
			s.lost = append(s.lost, fmt.Errorf("%w: %s", ErrXattrSpace, last.fullName()))
			continue
		}
		total -= s.block[most].size()
		s.block[most].nr = 0
		total += s.block[most].size()
	}
	order := func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.prefix, b.prefix), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	}
	slices.SortFunc(s.inode, order)
	slices.SortFunc(s.block, order)
	for i := range s.block {
		if s.block[i].nr >= 0 {
			s.block[i].nr = len(s.values)
			s.values = append(s.values, s.block[i])
		}
	}
	return s
}

func (x *xattr) fullName() string {
	for _, p := range xattrPrefixes {
		if p.nr == x.prefix {
			return p.name + x.name
		}
	}
	return [...]string{2: "system.posix_acl_access", 3: "system.posix_acl_default"}[x.prefix]
}

// planSets counts the inodes of each set and numbers blocks and value inodes.
func (p *Plan) planSets() error {
	p.sets = make([]setPlan, p.t.XattrSets())
	for i := range p.t.Len() {
		p.sets[p.t.XattrSet(filetree.ID(i))].inodes++
	}
	var blocks, values int64
	for i := range p.sets {
		s := &p.sets[i]
		packed := packSet(p.t.Set(i))
		s.block, s.value = uint32(blocks), uint32(values)
		if s.inodes == 0 || len(packed.block) == 0 {
			continue
		}
		s.blocks = uint32(ceilDiv(int64(s.inodes), xattrUses))
		s.values = uint32(len(packed.values))
		blocks += int64(s.blocks)
		values += int64(s.values)
		if blocks > math.MaxUint32 || values > math.MaxUint32 {
			return fmt.Errorf("%w: too many extended attributes", ErrTooLarge)
		}
	}
	p.eaBlocks, p.eaInodes = blocks, values
	return nil
}

// value is the value of an attribute that has an inode of its own.
type value struct {
	ino  uint32
	set  int
	refs uint32 // attribute blocks that refer to it
	data []byte
}

// values yields all attribute values that have inodes, in the inodes' order.
func (p *Plan) values() iter.Seq[value] {
	return func(yield func(value) bool) {
		if p.eaInodes == 0 {
			return
		}
		for i, s := range p.sets {
			if s.values == 0 {
				continue
			}
			for j, x := range packSet(p.t.Set(i)).values {
				if !yield(value{p.valueIno(i, j), i, s.blocks, x.value}) {
					return
				}
			}
		}
	}
}

// valueIno is the inode of a set's value.
func (p *Plan) valueIno(set, nr int) uint32 {
	if p.kept != nil {
		return p.kept.sets[set].values[nr].ino
	}
	return p.lastTreeIno() + 1 + p.sets[set].value + uint32(nr)
}

// valueHash is what the kernel keeps of a value that has an inode.
func (p *Plan) valueHash(v []byte) uint32 { return crc32c(p.seed, v) }

// encodeXattrs puts entries and values into area, whose value offsets count
// from base, and returns the hash of a block of them.
func (p *Plan) encodeXattrs(area []byte, xs []xattr, base int, values func(nr int) uint32, hashed bool) (blockHash uint32) {
	le := binary.LittleEndian
	at, end := 0, len(area)
	for i := range xs {
		x := &xs[i]
		e := area[at:]
		e[0], e[1] = byte(len(x.name)), x.prefix
		le.PutUint32(e[8:], uint32(len(x.value)))
		copy(e[16:], x.name)
		hash := uint32(0)
		for _, c := range []byte(x.name) {
			hash = hash<<5 ^ hash>>27 ^ uint32(c)
		}
		switch {
		case x.nr >= 0:
			le.PutUint32(e[4:], values(x.nr))
			hash = hash<<16 ^ hash>>16 ^ p.valueHash(x.value)
		case len(x.value) > 0:
			n := (len(x.value) + 3) &^ 3
			end -= n
			copy(area[end:], x.value)
			le.PutUint16(e[2:], uint16(base+end))
			for w := area[end : end+n]; len(w) > 0; w = w[4:] {
				hash = hash<<16 ^ hash>>16 ^ le.Uint32(w)
			}
		}
		if hashed {
			le.PutUint32(e[12:], hash)
		}
		blockHash = blockHash<<16 ^ blockHash>>16 ^ hash
		at += 16 + (len(x.name)+3)&^3
	}
	return blockHash
}

const xattrMagic = 0xea020000

// xattrBlock fills the block with the number nr of a set, at block at of the image.
func (p *Plan) xattrBlock(b []byte, set, nr int, at int64) {
	le := binary.LittleEndian
	clear(b)
	s := &p.sets[set]
	packed := packSet(p.t.Set(set))
	le.PutUint32(b, xattrMagic)
	le.PutUint32(b[4:], min(s.inodes-uint32(nr)*xattrUses, xattrUses))
	le.PutUint32(b[8:], 1)
	le.PutUint32(b[12:], p.encodeXattrs(b[32:], packed.block, 32, func(i int) uint32 { return p.valueIno(set, i) }, true))
	sum := crc32c(p.seed, le.AppendUint64(nil, uint64(at)))
	le.PutUint32(b[16:], crc32c(sum, b))
}

// inodeXattrs fills the end of an inode.
func (p *Plan) inodeXattrs(b []byte, set int) {
	if set == 0 {
		return
	}
	if packed := packSet(p.t.Set(set)); len(packed.inode) > 0 {
		binary.LittleEndian.PutUint32(b, xattrMagic)
		p.encodeXattrs(b[4:], packed.inode, 0, nil, false)
	}
}
