package boot

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/instar-image/instar/initrd/lazyroot"
)

// filesystem is what a block device holds, by its superblock.
type filesystem struct {
	Kind, UUID, Label string
}

// probe reads the superblock of a filesystem or swap space; Kind is "" if none
// is known.
func probe(r io.ReaderAt) (filesystem, error) {
	buf := make([]byte, 0x10240)
	n, err := r.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return filesystem{}, err
	}
	buf = buf[:n]
	at := func(off, size int) []byte {
		if off+size > len(buf) {
			return make([]byte, size)
		}
		return buf[off : off+size]
	}
	label := func(off, size int) string {
		s, _, _ := bytes.Cut(at(off, size), []byte{0})
		return strings.TrimRight(string(s), " ")
	}
	switch {
	case binary.LittleEndian.Uint16(at(0x438, 2)) == 0xef53:
		return filesystem{extKind(at(0x45c, 4), at(0x460, 4)), uuid(at(0x468, 16)), label(0x478, 16)}, nil
	case string(at(0, 4)) == "XFSB":
		return filesystem{"xfs", uuid(at(32, 16)), label(108, 12)}, nil
	case string(at(0x10040, 8)) == "_BHRfS_M":
		return filesystem{"btrfs", uuid(at(0x10020, 16)), label(0x1012b, 256)}, nil
	case string(at(4086, 10)) == "SWAPSPACE2":
		return filesystem{"swap", uuid(at(0x40c, 16)), label(0x41c, 16)}, nil
	case string(at(0x52, 5)) == "FAT32":
		return filesystem{"vfat", fatID(at(0x43, 4)), label(0x47, 11)}, nil
	case string(at(0x36, 3)) == "FAT":
		return filesystem{"vfat", fatID(at(0x27, 4)), label(0x2b, 11)}, nil
	}
	return filesystem{}, nil
}

// extKind tells ext2 and ext3 from ext4 by what they cannot have.
func extKind(compat, incompat []byte) string {
	const extents, bit64, flexBG, journal = 0x40, 0x80, 0x200, 0x4
	switch {
	case binary.LittleEndian.Uint32(incompat)&(extents|bit64|flexBG) != 0:
		return "ext4"
	case binary.LittleEndian.Uint32(compat)&journal != 0:
		return "ext3"
	}
	return "ext2"
}

func uuid(b []byte) string {
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func fatID(b []byte) string {
	return strings.ToUpper(fmt.Sprintf("%02x%02x-%02x%02x", b[3], b[2], b[1], b[0]))
}

// kindUnfinished is in place of a filesystem on the disk of a lazy root that is
// not all there.
const kindUnfinished = "instar"

// device is a block device: a disk or a partition.
type device struct {
	Name      string // "vda1"
	Disk      bool   // not a partition
	ReadOnly  bool
	Size      int64 // bytes
	PartUUID  string
	PartLabel string
	filesystem
}

func (d device) path() string { return "/dev/" + d.Name }

// listDevices looks at all block devices in sys (/sys/class/block) whose nodes
// are in dev. Memory, loop and optical ones are left out.
func listDevices(sys, dev string) ([]device, error) {
	entries, err := os.ReadDir(sys)
	if err != nil {
		return nil, fmt.Errorf("listing block devices: %w", err)
	}
	var list []device
	for _, e := range entries {
		name := e.Name()
		if skipDevice(name) {
			continue
		}
		read := func(file string) string {
			data, err := os.ReadFile(filepath.Join(sys, name, file))
			if err != nil {
				return ""
			}
			return strings.TrimSpace(string(data))
		}
		var sectors int64
		if _, err := fmt.Sscan(read("size"), &sectors); err != nil || sectors == 0 {
			continue // no medium
		}
		d := device{Name: name, Disk: read("partition") == "", ReadOnly: read("ro") == "1", Size: sectors * 512}
		for line := range strings.Lines(read("uevent")) {
			switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); key {
			case "PARTUUID":
				d.PartUUID = value
			case "PARTNAME":
				d.PartLabel = value
			}
		}
		if f, err := os.Open(filepath.Join(dev, name)); err == nil {
			d.filesystem, _ = probe(f) // an unreadable device has no filesystem that counts
			if r, err := lazyroot.StateOf(f, d.Size); err == nil && r.State == lazyroot.Filling && d.Kind == "" {
				d.Kind = kindUnfinished
			}
			f.Close()
		}
		list = append(list, d)
	}
	return list, nil
}

func skipDevice(name string) bool {
	for _, p := range []string{"ram", "loop", "zram", "sr", "fd", "nbd", "dm-", "md"} {
		if rest, ok := strings.CutPrefix(name, p); ok && strings.Trim(rest, "0123456789") == "" {
			return true
		}
	}
	return false
}

// findDevice is the device that a word of fstab names, if it is there.
func findDevice(list []device, spec string) (device, bool) {
	key, value, tagged := strings.Cut(spec, "=")
	value = strings.Trim(value, `"`)
	for _, d := range list {
		switch {
		case !tagged && spec == d.path():
			return d, true
		case tagged && value == "":
		case key == "UUID" && strings.EqualFold(value, d.UUID), key == "LABEL" && value == d.Label,
			key == "PARTUUID" && strings.EqualFold(value, d.PartUUID), key == "PARTLABEL" && value == d.PartLabel:
			return d, true
		}
	}
	return device{}, false
}
