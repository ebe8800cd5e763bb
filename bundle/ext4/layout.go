package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// ErrLayout is wrapped by the errors of [ReadLayout].
var ErrLayout = errors.New("damaged layout of a filesystem image")

// Layout says where everything of an image lies, and what the captured files
// looked like then. It is what [Plan.WriteLayout] wrote, immutable and safe for
// concurrent use, and takes some 20 bytes a file.
//
// Its form: the line "instar ext4 layout 1", a header, and the directories in
// preorder, children in the order of their names' bytes. Numbers are varints
// as encoding/binary has them; within a directory they count from the entry
// before, and nothing counts across directories, so that a change in one
// leaves the bytes of the others as they were.
//
//	header:    length ‖ size ‖ UUID (16) ‖ blocks ‖ inodes per group ‖ journal blocks ‖ created
//	           ‖ block of the first extent block ‖ of lost+found's spare blocks ‖ of the first inode table
//	           ‖ started, seconds and nanoseconds ‖ n ‖ n devices: 0 the root's, others one more than their number
//	           ‖ n ‖ n × (digest of a set of attributes (16) ‖ runs of its blocks ‖ v ‖ v × (inode of a value ‖ its runs))
//	directory: length ‖ runs of its blocks ‖ runs of its extent blocks ‖ entries; length 0 ends the layout
//	entry:     type and flags (1) ‖ bytes shared with the name before ‖ n ‖ n bytes of name ‖ inode ‖ by type:
//	  regular:   size ‖ [pieces, if it has holes] ‖ [runs of its data, or one start] ‖ [runs of its extent blocks, if it has any]
//	             ‖ [mtime ‖ ctime ‖ device's number ‖ inode where it was captured]
//	  symlink:   [start of its block]
//	ctime:     0 ‖ seconds ‖ nanoseconds; or one more than the zigzag code of the nanoseconds since the entry before
//	runs:      n ‖ n × (start ‖ length)
//	pieces:    n ‖ n × (blocks of hole ‖ blocks of data)
type Layout struct {
	header layoutHeader
	dirs   []byte // the directories, checked
	n      int    // entries
}

type layoutHeader struct {
	size                  int64
	uuid                  [16]byte
	blocks, ipg, journal  int64
	created               int64
	extents, lost, tables int64
	started               filetree.Time
	devs                  []uint64
	sets                  []layoutSet
}

// layoutSet is where the attributes of a set lie that are outside the inodes.
type layoutSet struct {
	digest [16]byte
	blocks []run
	values []layoutValue
}

type layoutValue struct {
	ino  uint32
	runs []run
}

const (
	layoutMagic   = "instar ext4 layout 1\n"
	maxLayout     = 1 << 31 // bytes
	maxLayoutSize = 1 << 28 // bytes of the header or a directory
)

// Flags of an entry, beside the type of its file in the low bits, 0 for one
// more name of an inode that came before.
const (
	entryFacts  = 1 << 4 // it has the facts that recognise it
	entrySparse = 1 << 5
	entryRuns   = 1 << 6 // regular: its data take several runs; symlink: it has a block
	entryNames  = 1 << 7 // it has more names
)

// record is an entry.
type record struct {
	name         []byte
	mode         uint32 // its type, 0 for one more name
	names        bool   // more of them follow
	ino          uint32
	size         int64
	sparse       bool
	pieces       []run // of data, in blocks of the file, if it is sparse
	runs         []run // where its blocks lie
	trees        []run
	facts        bool
	mtime, ctime filetree.Time
	dev, host    uint64
}

// ReadLayout reads a layout to its end. It holds what it reads to the limits of
// the filesystem it describes; that no two things lie in one place only
// [NewPlan] checks. Its errors wrap [ErrLayout], or what r fails with.
func ReadLayout(r io.Reader) (*Layout, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxLayout+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the layout of a filesystem image: %w", err)
	case len(raw) > maxLayout:
		return nil, fmt.Errorf("%w: more than %d bytes", ErrLayout, maxLayout)
	case !bytes.HasPrefix(raw, []byte(layoutMagic)):
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrLayout, layoutMagic)
	}
	d := &layoutDecoder{b: raw[len(layoutMagic):]}
	l := &Layout{}
	head := &layoutDecoder{b: d.block()}
	if d.err == nil {
		l.header.decode(head)
		head.end("the header")
		d.err = head.err
	}
	if d.err != nil {
		return nil, d.err
	}
	l.dirs = d.b
	if err := l.check(); err != nil {
		return nil, err
	}
	return l, nil
}

// Size is that of the image in bytes.
func (l *Layout) Size() int64 { return l.header.size }

// Names is the number of names in the image.
func (l *Layout) Names() int { return l.n }

// check goes through all directories once.
func (l *Layout) check() error {
	names := map[uint32]struct{}{} // inodes that have more than one
	w := newLayoutWalk(l, filetree.None)
	for w.directory() {
		for w.next() {
			r := &w.rec
			l.n++
			if _, ok := names[r.ino]; r.mode == 0 && !ok {
				w.d.fail("%q is another name of inode %d, which has none", r.name, r.ino)
			}
			if r.names {
				names[r.ino] = struct{}{}
			}
			if r.mode == unix.S_IFDIR {
				w.descend(filetree.None)
			}
		}
	}
	return w.err
}

// layoutDecoder takes numbers off b. After an error everything is 0.
type layoutDecoder struct {
	b   []byte
	err error
}

func (d *layoutDecoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", ErrLayout, fmt.Sprintf(format, args...))
	}
	d.b = nil
}

func (d *layoutDecoder) end(what string) {
	if d.err == nil && len(d.b) > 0 {
		d.fail("%d bytes after the end of %s", len(d.b), what)
	}
}

// number takes a number from 0 to most.
func (d *layoutDecoder) number(most uint64) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || v > most {
		d.fail("a number is cut short or larger than %d", most)
		return 0
	}
	d.b = d.b[n:]
	return v
}

// step takes a number relative to from; the sum is to be from low to high.
func (d *layoutDecoder) step(from, low, high int64) int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail("a number is cut short")
		return low
	}
	d.b = d.b[n:]
	sum := from + v // may wrap, where the bounds are the type's
	if sum < low || sum > high {
		d.fail("%d is not from %d to %d", sum, low, high)
		return low
	}
	return sum
}

func (d *layoutDecoder) take(n int) []byte {
	if n > len(d.b) {
		d.fail("cut short")
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

// block takes a length and so many bytes.
func (d *layoutDecoder) block() []byte { return d.take(int(d.number(maxLayoutSize))) }

// count takes the number of things that take min bytes each at least.
func (d *layoutDecoder) count(least int) int {
	n := d.number(math.MaxInt32)
	if int(n) > len(d.b)/least {
		d.fail("%d things in %d bytes", n, len(d.b))
		return 0
	}
	return int(n)
}

// run takes a run of blocks below limit, and moves from to its end.
func (d *layoutDecoder) run(from *int64, limit int64) run {
	start := d.step(*from, 1, limit-1)
	n := int64(d.number(uint64(limit - start)))
	if n == 0 {
		d.fail("a run of no blocks")
	}
	*from = start + n
	return run{start, n}
}

func (d *layoutDecoder) runs(out []run, from *int64, limit int64) []run {
	for range d.count(2) {
		out = append(out, d.run(from, limit))
	}
	return out
}

func (d *layoutDecoder) time(before filetree.Time) filetree.Time {
	sec := d.step(before.Sec, math.MinInt64, math.MaxInt64)
	return filetree.Time{Sec: sec, Nsec: uint32(d.number(math.MaxUint32))}
}

// near takes a time that may be given as nanoseconds since before.
func (d *layoutDecoder) near(before filetree.Time) filetree.Time {
	v := d.number(math.MaxUint64)
	if v == 0 {
		return d.time(before)
	}
	from, ok := nanoseconds(before)
	if !ok {
		d.fail("a time that counts from one out of range")
	}
	v--
	ns := from + (int64(v>>1) ^ -int64(v&1))
	t := filetree.Time{Sec: ns / 1e9, Nsec: uint32((ns%1e9 + 1e9) % 1e9)}
	if ns < 0 && t.Nsec > 0 {
		t.Sec--
	}
	return t
}

// nanoseconds are those of a time since 1970, for times within 136 years of it:
// no difference of two of them overflows.
func nanoseconds(t filetree.Time) (int64, bool) {
	return t.Sec*1e9 + int64(t.Nsec), t.Sec > -1<<32 && t.Sec < 1<<32 && t.Nsec < 1e9
}

func (h *layoutHeader) decode(d *layoutDecoder) {
	h.size = int64(d.number(maxBlocks * BlockSize))
	copy(h.uuid[:], d.take(16))
	h.blocks = int64(d.number(uint64(h.size / BlockSize)))
	h.ipg = int64(d.number(groupBlocks))
	h.journal = int64(d.number(10_240_000))
	h.created = int64(d.number(math.MaxUint32))
	for _, at := range []*int64{&h.extents, &h.lost, &h.tables} {
		*at = int64(d.number(uint64(h.blocks)))
	}
	h.started = d.time(filetree.Time{})
	for range d.count(1) {
		h.devs = append(h.devs, d.number(math.MaxUint64))
	}
	for range d.count(18) {
		var s layoutSet
		copy(s.digest[:], d.take(16))
		var at int64
		s.blocks = d.runs(nil, &at, h.blocks)
		for range d.count(3) {
			v := layoutValue{ino: uint32(d.number(math.MaxUint32))}
			v.runs = d.runs(nil, &at, h.blocks)
			s.values = append(s.values, v)
		}
		h.sets = append(h.sets, s)
	}
	if h.blocks < 2048 || h.ipg < 16 || h.ipg%16 != 0 || h.journal < 1024 {
		d.fail("%d blocks, %d inodes a group, a journal of %d blocks", h.blocks, h.ipg, h.journal)
	}
}
