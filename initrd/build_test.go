package initrd_test

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"

	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	qemutest.Remove()
	os.Exit(code)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// elfFile is a 64-bit ELF file with one section beside the names'.
func elfFile(kind elf.Type, section, content string) []byte {
	names := "\x00.shstrtab\x00" + section + "\x00"
	head := elf.Header64{Type: uint16(kind), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 1}
	copy(head.Ident[:], "\x7fELF\x02\x01\x01")
	body := names + content
	head.Shoff = uint64(64 + len(body))
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, head)
	b.WriteString(body)
	binary.Write(&b, binary.LittleEndian, []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: 64, Size: uint64(len(names))},
		{Name: 11, Type: uint32(elf.SHT_PROGBITS), Off: uint64(64 + len(names)), Size: uint64(len(content))},
	})
	return b.Bytes()
}

func module(info ...string) []byte {
	return elfFile(elf.ET_REL, ".modinfo", strings.Join(info, "\x00")+"\x00")
}

func pack(t *testing.T, suffix string, data []byte) []byte {
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch suffix {
	case ".xz":
		w, err = xz.NewWriter(&b)
	case ".zst":
		w, err = zstd.NewWriter(&b)
	case ".gz":
		w = gzip.NewWriter(&b)
	}
	must(t, err)
	_, err = w.Write(data)
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}

func staticInit(t *testing.T) string {
	name := filepath.Join(t.TempDir(), "init")
	must(t, os.WriteFile(name, elfFile(elf.ET_EXEC, ".x", "y"), 0o755))
	return name
}

// unpack reads an uncompressed initrd into names and contents.
func unpack(t *testing.T, data []byte) map[string]string {
	files := make(map[string]string)
	var order []string
	must(t, cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(data)), func(r cpio.Record) error {
		if dir := filepath.Dir(r.Name); dir != "." && !slices.Contains(order, dir) {
			t.Errorf("%s comes before its directory", r.Name)
		}
		order = append(order, r.Name)
		b, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
		files[r.Name] = string(b)
		return err
	}))
	return files
}

func TestModules(t *testing.T) {
	plain := module("depends=lib-b,lib_c", "vermagic=1")
	libB := module("depends=lib-d")
	libC := module("depends=", "softdep=pre: lib-e absent post: lib-f")
	tree := fstest.MapFS{
		"lib/modules/6.1.0/kernel/drivers/a.ko":         {Data: plain},
		"lib/modules/6.1.0/kernel/lib/lib-b.ko.xz":      {Data: pack(t, ".xz", libB)},
		"lib/modules/6.1.0/kernel/lib/lib_c.ko.zst":     {Data: pack(t, ".zst", libC)},
		"lib/modules/6.1.0/kernel/lib/lib-d.ko.gz":      {Data: pack(t, ".gz", module("depends="))},
		"lib/modules/6.1.0/kernel/lib/lib-e.ko":         {Data: module("depends=")},
		"lib/modules/6.1.0/kernel/lib/lib-f.ko":         {Data: module("depends=")},
		"lib/modules/6.1.0/kernel/fs/ext4/ext4.ko":      {Data: module("depends=jbd2,lib_d")},
		"lib/modules/6.1.0/kernel/loop1.ko":             {Data: module("depends=loop2")},
		"lib/modules/6.1.0/kernel/loop2.ko":             {Data: module("depends=loop1")},
		"lib/modules/6.1.0/kernel/lost.ko":              {Data: module("depends=nowhere")},
		"lib/modules/6.1.0/kernel/text.ko":              {Data: []byte("text")},
		"lib/modules/6.1.0/kernel/none.ko":              {Data: elfFile(elf.ET_REL, ".text", "x")},
		"lib/modules/6.1.0/modules.builtin":             {Data: []byte("kernel/fs/jbd2/jbd2.ko\nkernel/built-in.ko\n")},
		"usr/lib/modules/6.1.0/kernel/unrelated/one.ko": {Data: plain},
	}
	build := func(names ...string) (*initrd.Report, map[string]string, error) {
		var b bytes.Buffer
		r, err := initrd.Build(t.Context(), initrd.Options{Init: staticInit(t), Modules: tree, ModuleNames: names, Compression: initrd.None}, &b)
		if err != nil {
			return nil, nil, err
		}
		return r, unpack(t, b.Bytes()), nil
	}
	r, files, err := build("a", "built_in")
	must(t, err)
	if want := []string{"lib_d", "lib_b", "lib_e", "lib_c", "a", "ext4"}; !slices.Equal(r.Modules, want) {
		t.Errorf("modules %q, want %q", r.Modules, want)
	}
	if r.Version != "6.1.0" || r.Arch != "EM_X86_64" {
		t.Errorf("report %+v", r)
	}
	if want := "/lib/modules/kernel/lib/lib-d.ko\n/lib/modules/kernel/lib/lib-b.ko\n/lib/modules/kernel/lib/lib-e.ko\n/lib/modules/kernel/lib/lib_c.ko\n/lib/modules/kernel/drivers/a.ko\n"; files["etc/instar/modules"] != want {
		t.Errorf("order %q", files["etc/instar/modules"])
	}
	if want := "/lib/modules/kernel/fs/ext4/ext4.ko\n"; files["etc/instar/modules.ext4"] != want {
		t.Errorf("ext4's order %q", files["etc/instar/modules.ext4"])
	}
	if files["lib/modules/kernel/lib/lib-b.ko"] != string(libB) || files["lib/modules/kernel/lib/lib_c.ko"] != string(libC) {
		t.Error("a compressed module is not unpacked")
	}
	if !strings.Contains(files["etc/instar/boot.json"], `"kernelRelease": "6.1.0"`) {
		t.Errorf("configuration %s", files["etc/instar/boot.json"])
	}
	for name, want := range map[string]string{
		"absent": "neither a file nor built in", "loop1": "depends on itself", "lost": "nowhere, which lost depends on",
		"text": "reading kernel module kernel/text.ko", "none": "not a kernel module",
	} {
		if _, _, err := build(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", name, err, want)
		}
	}
	tree["lib/modules/6.2.0/kernel/x.ko"] = &fstest.MapFile{Data: plain}
	if _, _, err := build("a"); err == nil || !strings.Contains(err.Error(), "several kernels") {
		t.Errorf("two kernels: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	dynamic := filepath.Join(t.TempDir(), "dynamic")
	data, err := os.ReadFile("/bin/ls")
	must(t, err)
	must(t, os.WriteFile(dynamic, data, 0o755))
	text := filepath.Join(t.TempDir(), "text")
	must(t, os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755))
	object := filepath.Join(t.TempDir(), "object")
	must(t, os.WriteFile(object, module("x"), 0o755))
	for _, c := range []struct {
		name, want string
		o          initrd.Options
	}{
		{"init absent", "no such file", initrd.Options{Init: "/nowhere"}},
		{"init linked dynamically", "linked dynamically", initrd.Options{Init: dynamic}},
		{"init is a script", "not an executable", initrd.Options{Init: text}},
		{"init is an object", "not an executable", initrd.Options{Init: object}},
		{"shell linked dynamically", "linked dynamically", initrd.Options{Init: staticInit(t), Shell: dynamic}},
		{"compression", "unknown compression", initrd.Options{Init: staticInit(t), Compression: "lzma"}},
		{"configuration", "instar.net", initrd.Options{Init: staticInit(t), Config: boot.Config{Net: "carrier pigeon"}}},
		{"certificates", "not PEM", initrd.Options{Init: staticInit(t), CACerts: []byte("x")}},
		{"signers", "signer", initrd.Options{Init: staticInit(t), Signers: []byte("me nonsense")}},
		{"no modules", "lib/modules", initrd.Options{Init: staticInit(t), Modules: fstest.MapFS{"etc/x": {}}}},
	} {
		var b bytes.Buffer
		if _, err := initrd.Build(t.Context(), c.o, &b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

// TestSizeAndReproducibility builds the real thing twice.
func TestSizeAndReproducibility(t *testing.T) {
	_, root := qemutest.Kernel(t)
	init := qemutest.Init(t)
	for _, c := range []struct {
		compression initrd.Compression
		limit       int64
	}{{initrd.Zstd, 8 << 20}, {initrd.Gzip, 8 << 20}} {
		var first, second bytes.Buffer
		r, err := initrd.Build(t.Context(), initrd.Options{Init: init, Modules: os.DirFS(root), Compression: c.compression}, &first)
		must(t, err)
		_, err = initrd.Build(t.Context(), initrd.Options{Init: init, Modules: os.DirFS(root), Compression: c.compression}, &second)
		must(t, err)
		if !bytes.Equal(first.Bytes(), second.Bytes()) {
			t.Errorf("%s: two builds differ", c.compression)
		}
		var sum int64
		lines := ""
		for _, p := range r.Parts {
			sum += p.Stored
			lines += fmt.Sprintf("  %s: %d files, %d bytes, %d stored\n", p.Name, p.Files, p.Bytes, p.Stored)
		}
		t.Logf("%s: %d bytes, %d modules\n%s", c.compression, r.Stored, len(r.Modules), lines)
		if r.Stored > c.limit || r.Stored != int64(first.Len()) || sum > r.Stored || sum < r.Stored-1024 {
			t.Errorf("%s: %d bytes in %d bytes of parts; at most %d are wanted", c.compression, r.Stored, sum, c.limit)
		}
	}
}
