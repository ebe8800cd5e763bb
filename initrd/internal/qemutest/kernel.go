package qemutest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
)

// unpacked is a kernel that does not unpack itself, which takes an emulated
// processor a second or two: the ELF file in it, which QEMU starts by the PVH
// protocol. It is made once a user, and lies beside the kernel. A kernel that is
// packed in another way than Debian's is started as it is.
func unpacked(t testing.TB, kernel string) string {
	t.Helper()
	dir, name := filepath.Split(kernel)
	release, ok := strings.CutPrefix(name, "vmlinuz-")
	if !ok {
		return kernel
	}
	plain := filepath.Join(dir, "vmlinux-"+release)
	if _, err := os.Stat(plain); err == nil {
		return plain
	}
	data, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	elf, err := vmlinux(data)
	if errors.Is(err, errOtherwise) {
		return kernel
	}
	if err != nil {
		t.Fatalf("unpacking %s: %v", kernel, err)
	}
	part, err := os.CreateTemp(dir, ".vmlinux-*") // other tests may be at it too
	if err != nil {
		t.Fatal(err)
	}
	_, err = part.Write(elf)
	if err = errors.Join(err, part.Close()); err == nil {
		err = os.Rename(part.Name(), plain)
	}
	if err != nil {
		t.Fatal(errors.Join(err, os.Remove(part.Name())))
	}
	return plain
}

// errOtherwise: a kernel is not packed by LZ4.
var errOtherwise = errors.New("it is packed otherwise")

// vmlinux unpacks a bzImage (Linux, Documentation/arch/x86/boot.rst): its payload is
// a frame of LZ4's legacy format, then the length of what was packed.
func vmlinux(b []byte) ([]byte, error) {
	const magic = "\x02\x21\x4c\x18"
	if len(b) < 0x250 || string(b[0x202:0x206]) != "HdrS" {
		return nil, errOtherwise
	}
	field := func(at int) int { return int(binary.LittleEndian.Uint32(b[at:])) }
	from := (int(b[0x1f1])+1)*512 + field(0x248)
	to := from + field(0x24c)
	if from < 0 || to > len(b) || to-from < 12 || from > to {
		return nil, fmt.Errorf("its payload is at %d to %d of %d bytes", from, to, len(b))
	}
	packed, length := b[from:to-4], field(to-4)
	if !bytes.HasPrefix(packed, []byte(magic)) {
		return nil, errOtherwise
	}
	var out []byte
	block := make([]byte, 8<<20)
	for packed = packed[4:]; len(packed) > 4; {
		n := int(binary.LittleEndian.Uint32(packed))
		if n > len(packed)-4 {
			return nil, fmt.Errorf("a block has %d bytes of %d", n, len(packed)-4)
		}
		k, err := lz4.UncompressBlock(packed[4:4+n], block)
		if err != nil {
			return nil, err
		}
		out, packed = append(out, block[:k]...), packed[4+n:]
	}
	if len(out) != length {
		return nil, fmt.Errorf("%d bytes came out, not %d", len(out), length)
	}
	return out, nil
}
