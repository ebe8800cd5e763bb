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

	"github.com/klauspost/compress/zstd"
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

// errOtherwise: a kernel is packed in a way that no kernel of Debian's is.
var errOtherwise = errors.New("it is packed otherwise")

// vmlinux unpacks a bzImage (Linux, Documentation/arch/x86/boot.rst): its payload is
// packed by LZ4 or Zstandard, then there is the length of what was packed.
func vmlinux(b []byte) ([]byte, error) {
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
	var out []byte
	var err error
	switch {
	case bytes.HasPrefix(packed, []byte("\x02\x21\x4c\x18")):
		out, err = unpackLZ4(packed[4:])
	case bytes.HasPrefix(packed, []byte("\x28\xb5\x2f\xfd")):
		out, err = unpackZstd(packed, length)
	default:
		return nil, errOtherwise
	}
	if err == nil && len(out) != length {
		err = fmt.Errorf("%d bytes came out, not %d", len(out), length)
	}
	return out, err
}

// unpackLZ4 unpacks a frame of LZ4's legacy format, from behind its magic number.
func unpackLZ4(packed []byte) (out []byte, err error) {
	block := make([]byte, 8<<20)
	for len(packed) > 4 {
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
	return out, nil
}

// unpackZstd unpacks a frame, which is one of length bytes.
func unpackZstd(packed []byte, length int) ([]byte, error) {
	// The kernel's frames look back over all of it: 128 MiB.
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(256<<20))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.DecodeAll(packed, make([]byte, 0, min(length, 256<<20)))
}
