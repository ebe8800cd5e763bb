package rootfs

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Facts are what is known of the filesystem the volume lies in.
type Facts struct {
	Type       string   // as mounted: "ext4", "xfs", "overlay" …
	Device     string   // "/dev/vda1", or what the mount table has in its place
	MountPoint bool     // the volume is the root directory of that filesystem's mount
	UUID       [16]byte // zero if unknown
	Label      string   // "" if it has none or it is unknown
	Size, Used int64    // bytes, as statfs(2) gives them
	Machine    string   // uname -m of the running kernel: "x86_64", "aarch64" …
}

// SpecUUID is the UUID in the form of fstab(5), "" if there is none.
func (f *Facts) SpecUUID() string {
	if f.UUID == [16]byte{} {
		return ""
	}
	u := f.UUID
	return fmt.Sprintf("UUID=%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// gatherFacts asks the kernel and, for label and UUID, the superblock.
func gatherFacts(fd int, m *mount, mountPoint bool) (Facts, error) {
	f := Facts{Type: m.typ, Device: m.src, MountPoint: mountPoint}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return f, os.NewSyscallError("fstatfs", err)
	}
	f.Size = int64(st.Blocks) * st.Bsize
	f.Used = int64(st.Blocks-st.Bfree) * st.Bsize
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return f, os.NewSyscallError("uname", err)
	}
	f.Machine = unix.ByteSliceToString(u.Machine[:])
	if name := deviceNode(m); name != "" {
		f.Device = name
	}
	var noUUID, noLabel error
	if f.UUID, noUUID = kernelUUID(fd); noUUID == nil {
		if f.Label, noLabel = kernelLabel(fd); noLabel == nil {
			return f, nil
		}
	}
	if !strings.HasPrefix(f.Device, "/dev/") {
		return f, nil
	}
	label, uuid, err := readSuperblock(f.Device, m.typ)
	if err == nil {
		f.Label, f.UUID = label, uuid
	}
	return f, err
}

func readSuperblock(device, mounted string) (label string, uuid [16]byte, err error) {
	dev, err := os.Open(device)
	if err != nil {
		return "", uuid, err
	}
	defer dev.Close()
	head := make([]byte, superblockHead)
	if n, err := dev.ReadAt(head, 0); n < len(head) {
		return "", uuid, fmt.Errorf("reading the superblock of %s: %w", device, err)
	}
	typ, label, uuid := parseSuperblock(head)
	if typ == "" || typ != mounted && !(typ == "ext" && strings.HasPrefix(mounted, "ext")) {
		return "", uuid, fmt.Errorf("no superblock of %s on %s: label and UUID are unknown", mounted, device)
	}
	return label, uuid, nil
}

// deviceNode finds the block device of a mount by its number: the mount table
// may name it "/dev/root" or by a path that is gone.
func deviceNode(m *mount) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", m.dev[0], m.dev[1]))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return filepath.Join("/dev", name)
		}
	}
	return ""
}

// superblockHead is how many bytes of a device hold every superblock that
// parseSuperblock knows.
const superblockHead = 68 << 10

// parseSuperblock reads label and UUID: ext2-4 (at 1024, magic at 0x38), xfs
// (at 0), btrfs (at 64 KiB, magic at 0x40) and f2fs (at 1024). typ is "ext"
// for all of ext2-4, "" for anything else.
func parseSuperblock(b []byte) (typ, label string, uuid [16]byte) {
	at := func(off, n int) []byte {
		if off+n > len(b) {
			return make([]byte, n)
		}
		return b[off : off+n]
	}
	switch {
	case string(at(0, 4)) == "XFSB":
		copy(uuid[:], at(32, 16))
		return "xfs", cString(at(108, 12)), uuid
	case string(at(0x10040, 8)) == "_BHRfS_M":
		copy(uuid[:], at(0x10020, 16))
		return "btrfs", cString(at(0x1012b, 256)), uuid
	case bytes.Equal(at(0x438, 2), []byte{0x53, 0xef}):
		copy(uuid[:], at(0x468, 16))
		return "ext", cString(at(0x478, 16)), uuid
	case bytes.Equal(at(0x400, 4), []byte{0x10, 0x20, 0xf5, 0xf2}):
		copy(uuid[:], at(0x400+108, 16))
		return "f2fs", utf16String(at(0x400+124, 1024)), uuid
	}
	return "", "", uuid
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// utf16String reads the ASCII part of a little-endian UTF-16 label.
func utf16String(b []byte) string {
	var s []byte
	for i := 0; i+1 < len(b) && (b[i] != 0 || b[i+1] != 0); i += 2 {
		if b[i+1] != 0 || b[i] > 0x7e {
			return ""
		}
		s = append(s, b[i])
	}
	return string(s)
}

// activeSwaps are the swap files in use on this machine.
func activeSwaps() []string {
	b, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return nil
	}
	var files []string
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		if f := strings.Fields(s.Text()); len(f) > 1 && f[1] == "file" {
			files = append(files, unescape(f[0]))
		}
	}
	return files
}
