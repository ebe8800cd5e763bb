// Package disk puts a partition table around the stream of a filesystem image.
//
// In go the size and the map of a filesystem image and a kind of table; out
// comes the map of the whole disk and, through [Disk.Write], its bytes: table,
// filesystem, backup table, in order and in one pass. The package touches
// nothing but the writer it is given, needs no device mapper and no loop
// device, and gives the same bytes for the same input.
//
// No boot loader is installed: see [Disk.Notes].
package disk

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/instar-image/instar/bundle/sparse"
)

// Kind is a kind of partition table.
type Kind string

// The kinds of partition table, as option -P of bundle-vol names them.
const (
	None Kind = "none" // the bare filesystem
	MBR  Kind = "mbr"  // one active primary partition
	GPT  Kind = "gpt"  // a BIOS boot partition in the last slot, the filesystem in the first
)

// Errors of [Wrap] and [Disk.Write].
var (
	ErrKind     = errors.New("unknown kind of partition table")
	ErrSize     = errors.New("size not possible with this partition table")
	ErrMismatch = errors.New("filesystem stream does not fit its map")
)

const (
	sector = 512
	align  = 1 << 20 // of every partition; the classic tools' sector 63 is slow on today's disks
	block  = 4096    // the maps' granularity

	gptEntries   = 128
	gptEntrySize = 128
	gptTable     = gptEntries * gptEntrySize
	biosBoot     = 1 << 20 // bytes of the BIOS boot partition
)

// Partition types of UEFI's and GRUB's specifications.
var (
	typeLinux    = [16]byte{0x0f, 0xc6, 0x3d, 0xaf, 0x84, 0x83, 0x47, 0x72, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
	typeBIOSBoot = [16]byte{0x21, 0x68, 0x61, 0x48, 0x64, 0x49, 0x6e, 0x6f, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49}
)

// Disk is a planned disk image.
type Disk struct {
	kind       Kind
	start      int64 // of the filesystem
	fsSize     int64
	fsBytes    int64 // of the filesystem's map
	size       int64
	m          sparse.Map
	head, tail []byte
}

// ParseKind reads the argument of option -P.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case None, MBR, GPT:
		return k, nil
	}
	return "", fmt.Errorf("%w: %q (none, mbr or gpt)", ErrKind, s)
}

// Overhead is the least number of bytes by which a disk is larger than its
// filesystem; it is exact for filesystems of whole MiB.
func (k Kind) Overhead() int64 {
	switch k {
	case MBR:
		return align
	case GPT:
		return align + biosBoot + align
	}
	return 0
}

// Wrap plans a disk for a filesystem image of fsSize bytes, a multiple of 512,
// of which fsMap lists the data. The identifiers in the table derive from id,
// for which the filesystem's UUID serves.
func Wrap(kind Kind, fsSize int64, fsMap sparse.Map, id [16]byte) (*Disk, error) {
	if fsSize <= 0 || fsSize%sector != 0 {
		return nil, fmt.Errorf("%w: filesystem of %d bytes, want a positive multiple of %d", ErrSize, fsSize, sector)
	}
	if err := fsMap.Check(fsSize); err != nil {
		return nil, err
	}
	d := &Disk{kind: kind, fsSize: fsSize, fsBytes: fsMap.Bytes()}
	switch kind {
	case None:
		d.size, d.m = fsSize, fsMap
		return d, nil
	case MBR:
		d.start = kind.Start()
		d.size = d.start + fsSize
		if d.size/sector > 1<<32-1 {
			return nil, fmt.Errorf("%w: an MBR describes less than 2 TiB, the disk would be %d bytes (use gpt)", ErrSize, d.size)
		}
		d.head = make([]byte, block)
		mbr(d.head, derive(id, "disk"), 0x80, 0x83, d.start/sector, fsSize/sector)
	case GPT:
		d.start = kind.Start()
		d.size = roundUp(d.start+fsSize+gptTable+sector, align)
		d.gpt(id)
	default:
		return nil, fmt.Errorf("%w: %q", ErrKind, kind)
	}
	d.m = d.m.Append(sparse.Extent{Off: 0, Len: int64(len(d.head))})
	for _, e := range fsMap {
		d.m = d.m.Append(sparse.Extent{Off: d.start + e.Off, Len: e.Len})
	}
	d.m = d.m.Append(sparse.Extent{Off: d.size - int64(len(d.tail)), Len: int64(len(d.tail))})
	return d, nil
}

// Size is the size of the disk image in bytes.
func (d *Disk) Size() int64 { return d.size }

// Map lists which bytes of the disk image [Disk.Write] writes; the others are zero.
func (d *Disk) Map() sparse.Map { return d.m }

// Partition is where in the image the filesystem lies, in bytes.
func (d *Disk) Partition() (off, size int64) { return d.start, d.fsSize }

// Tables are the bytes around the filesystem: those from the image's beginning,
// and those up to its end. Both are empty without a partition table.
func (d *Disk) Tables() (head, tail []byte) { return d.head, d.tail }

// Start is where in an image with a partition table of this kind the
// filesystem begins, in bytes.
func (k Kind) Start() int64 {
	switch k {
	case MBR:
		return align
	case GPT:
		return align + biosBoot
	}
	return 0
}

// Notes are what an operator should know of the image, one sentence each.
func (d *Disk) Notes() []string {
	if d.kind == None {
		return nil
	}
	n := []string{"no boot loader is installed in the image: GRUB cannot be set up in a stream, " +
		"so start it with its own kernel and Instar's initrd, or with pvgrub by way of boot/grub/menu.lst (--grub-config)"}
	if d.kind == GPT {
		n = append(n, "partition 128 is kept free for GRUB 2: `grub-install` from within the running instance makes it boot by BIOS")
	}
	return n
}

// Write writes the bytes of [Disk.Map], one extent after the other. fs is
// called once and writes those of the filesystem's map; its error is returned
// as it is.
func (d *Disk) Write(ctx context.Context, w io.Writer, fs func(io.Writer) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := w.Write(d.head); err != nil {
		return fmt.Errorf("writing the partition table: %w", err)
	}
	c := &counter{w: w, left: d.fsBytes}
	if err := fs(c); err != nil {
		return err
	}
	if c.left != 0 {
		return fmt.Errorf("%w: %d bytes are missing", ErrMismatch, c.left)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := w.Write(d.tail); err != nil {
		return fmt.Errorf("writing the backup partition table: %w", err)
	}
	return nil
}

// counter refuses more bytes than the filesystem's map announced: they would
// shift all that follows.
type counter struct {
	w    io.Writer
	left int64
}

func (c *counter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		return 0, fmt.Errorf("%w: it is longer", ErrMismatch)
	}
	n, err := c.w.Write(p)
	c.left -= int64(n)
	return n, err
}

// mbr fills in a master boot record with one partition.
func mbr(b []byte, id [16]byte, active, typ byte, start, length int64) {
	copy(b[440:444], id[:4])
	p := b[446:462]
	p[0], p[4] = active, typ
	chs(p[1:4], start)
	chs(p[5:8], start+length-1)
	binary.LittleEndian.PutUint32(p[8:], uint32(start))
	binary.LittleEndian.PutUint32(p[12:], uint32(min(length, 1<<32-1)))
	b[510], b[511] = 0x55, 0xaa
}

// chs writes a sector number in the geometry of 255 heads and 63 sectors that
// every BIOS assumes; what lies beyond it is the largest value.
func chs(b []byte, lba int64) {
	c, h, s := lba/(255*63), lba/63%255, lba%63+1
	if c > 1023 {
		c, h, s = 1023, 254, 63
	}
	b[0], b[1], b[2] = byte(h), byte(s)|byte(c>>8<<6), byte(c)
}

// gpt makes both tables, UEFI specification 2.10, section 5.3.
func (d *Disk) gpt(id [16]byte) {
	entries := make([]byte, gptTable)
	entry := func(slot int, typ [16]byte, name string, start, size int64) {
		e := entries[slot*gptEntrySize:][:gptEntrySize]
		putGUID(e[0:], typ)
		putGUID(e[16:], derive(id, name))
		binary.LittleEndian.PutUint64(e[32:], uint64(start/sector))
		binary.LittleEndian.PutUint64(e[40:], uint64((start+size)/sector-1))
		for i, c := range []byte(name) {
			e[56+2*i] = c
		}
	}
	entry(0, typeLinux, "Linux", d.start, d.fsSize)
	entry(gptEntries-1, typeBIOSBoot, "BIOS Boot Partition", align, biosBoot)

	last := d.size/sector - 1
	header := func(at, other, table int64) []byte {
		h := make([]byte, sector)
		copy(h, "EFI PART")
		le := binary.LittleEndian
		le.PutUint32(h[8:], 0x00010000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], uint64(at))
		le.PutUint64(h[32:], uint64(other))
		le.PutUint64(h[40:], 2+gptTable/sector)
		le.PutUint64(h[48:], uint64(last-1-gptTable/sector))
		putGUID(h[56:], derive(id, "disk"))
		le.PutUint64(h[72:], uint64(table))
		le.PutUint32(h[80:], gptEntries)
		le.PutUint32(h[84:], gptEntrySize)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	d.head = make([]byte, roundUp(2*sector+gptTable, block))
	mbr(d.head, [16]byte{}, 0, 0xee, 1, last)
	copy(d.head[sector:], header(1, last, 2))
	copy(d.head[2*sector:], entries)

	d.tail = make([]byte, roundUp(sector+gptTable, block))
	backup := d.tail[len(d.tail)-sector-gptTable:]
	copy(backup, entries)
	copy(backup[gptTable:], header(last, 1, last-gptTable/sector))
}

// putGUID writes a GUID in its mixed byte order.
func putGUID(b []byte, g [16]byte) {
	b[0], b[1], b[2], b[3] = g[3], g[2], g[1], g[0]
	b[4], b[5], b[6], b[7] = g[5], g[4], g[7], g[6]
	copy(b[8:16], g[8:])
}

// derive makes an identifier from another one: a version 8 UUID.
func derive(id [16]byte, what string) [16]byte {
	h := sha256.Sum256(append([]byte("instar disk "+what+"\x00"), id[:]...))
	var g [16]byte
	copy(g[:], h[:])
	g[6] = g[6]&0x0f | 0x80
	g[8] = g[8]&0x3f | 0x80
	return g
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
