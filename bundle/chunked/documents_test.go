package chunked

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

var created = time.Date(2026, 11, 22, 5, 30, 0, 0, time.UTC)

func nameN(n int) Name { return NameOf(fmt.Appendf(nil, "object %d", n)) }

func namesN(from, to int) []ObjectSize {
	var list []ObjectSize
	for i := from; i < to; i++ {
		list = append(list, ObjectSize{nameN(i), 16<<20 + int64(i)})
	}
	sortObjects(list)
	return list
}

func sortObjects(list []ObjectSize) {
	for i := range list {
		for j := i; j > 0 && list[j].Name.Compare(list[j-1].Name) < 0; j-- {
			list[j], list[j-1] = list[j-1], list[j]
		}
	}
}

func testManifest() *Manifest {
	return &Manifest{
		Name: "machine-1", Sequence: 7, Created: created, Domain: "default", Parent: nameN(0),
		Description: `a "machine" with a \ and é`, Architecture: "x86_64", Partition: "none", Filesystem: "ext4", RootDevice: "/dev/sda1",
		BlockDeviceMapping: []Mapping{{"ami", "sda1"}, {"root", "/dev/sda1"}},
		Streams: []Content{
			{Name: "disk", Size: 10 << 30},
			{Name: "initrd", Size: 20 << 20, SHA256: strings.Repeat("ab", 32)},
			{Name: "kernel", Size: 8 << 20, SHA256: strings.Repeat("0d", 32)},
			{Name: "layout", Size: 1 << 20},
		},
		Cmdline: "console=ttyS0 ro", Index: IndexRef{ObjectSize{nameN(1), 900}, namesN(2, 5)}, Packs: namesN(5, 9),
		Data: 845 << 20, Added: 32 << 20, Tool: "instar 1.0",
	}
}

func testHead() *Head {
	return &Head{
		Name: "machine-1", Sequence: 7, Manifest: nameN(20), Versions: []Name{nameN(19), nameN(3)},
		Created: created, Expires: created.Add(24 * time.Hour),
	}
}

func testTrace() *Trace {
	return &Trace{Name: "machine-1", Manifest: nameN(20), Created: created, Ranges: []Range{{1 << 20, 4096}, {0, 1024}}}
}

func testCondemned() *Condemned {
	return &Condemned{Created: created, Objects: []string{
		KeysKey("machine-1", nameN(1)), TraceKey("machine-1", nameN(1)), IndexObjectKey(nameN(1)), MovedKey(nameN(2)), PackKey(nameN(3)),
	}}
}

func testIdentity(t testing.TB) *keys.Identity {
	t.Helper()
	id, err := keys.WriteIdentity(filepath.Join(t.TempDir(), "identity"), created)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func testKeys(t testing.TB, root Name, k Key, ids ...*keys.Identity) *KeysObject {
	t.Helper()
	o := &KeysObject{}
	for i, id := range ids {
		w, err := WrapIndexKey(root, k, id.Recipient(), fmt.Sprintf("identity %d", i))
		if err != nil {
			t.Fatal(err)
		}
		o.Recipients = append(o.Recipients, w)
	}
	return o
}

func domainDoc(t testing.TB, s Secret, ids ...*keys.Identity) *DomainDoc {
	t.Helper()
	d := &DomainDoc{Domain: "default", Sequence: 1, Created: created, Label: s.Domain().Label()}
	for _, id := range ids {
		w, err := WrapDomainSecret("default", s, id.Recipient(), "")
		if err != nil {
			t.Fatal(err)
		}
		d.Creators = append(d.Creators, w)
	}
	return d
}

// documents are one of each kind, with a fresh one to read it into.
func documents(t testing.TB) []struct{ d, empty document } {
	t.Helper()
	id := testIdentity(t)
	full, least := testManifest(), testManifest()
	least.Parent, least.Description, least.RootDevice, least.Cmdline = Name{}, "", "", ""
	least.BlockDeviceMapping, least.Streams, least.Index.Segments, least.Packs = nil, least.Streams[:1], nil, nil
	least.Data, least.Added = 0, 0
	return []struct{ d, empty document }{
		{full, &Manifest{}},
		{least, &Manifest{}},
		{testHead(), &Head{}},
		{&Head{Name: "x", Sequence: 1, Created: created}, &Head{}},
		{testTrace(), &Trace{}},
		{&Trace{Name: "x", Created: created}, &Trace{}},
		{testCondemned(), &Condemned{}},
		{testKeys(t, nameN(1), Key{1}, id, testIdentity(t)), &KeysObject{}},
		{domainDoc(t, Secret{1}, id), &DomainDoc{}},
		{&RunDoc{Name: "x"}, &RunDoc{}},
		{&RunDoc{Name: "x", Started: created}, &RunDoc{}},
	}
}

// TestDocuments: what is written is read again, is what Python writes of the
// same, and nothing else is read.
func TestDocuments(t *testing.T) {
	for i, c := range documents(t) {
		t.Run(fmt.Sprintf("%d %s", i, c.d.format()), func(t *testing.T) {
			doc, err := encode(c.d)
			if err != nil {
				t.Fatal(err)
			}
			if err := decode(c.empty, doc); err != nil {
				t.Fatalf("%v\n%s", err, doc)
			}
			again, err := encode(c.empty)
			if err != nil || !bytes.Equal(again, doc) {
				t.Fatalf("%v\n%s\nis read as\n%s", err, doc, again)
			}
			const program = `import json, sys
print(json.dumps(json.load(sys.stdin.buffer), indent=2, ensure_ascii=False))`
			cmd := exec.Command("python3", "-c", program)
			cmd.Env = append(os.Environ(), "PYTHONIOENCODING=utf-8")
			cmd.Stdin = bytes.NewReader(doc)
			if out, err := cmd.Output(); err != nil || !bytes.Equal(out, doc) {
				t.Errorf("Python writes it otherwise: %v\n%s", err, out)
			}
			// Each byte changed, left out, doubled: refused, or another document.
			step := 1 + len(doc)>>12*64 // a hybrid recipient is long, and slow to parse
			for j := 0; j < len(doc); j += step {
				for _, other := range [][]byte{
					append(append(bytes.Clone(doc[:j]), doc[j]^1), doc[j+1:]...),
					append(append(bytes.Clone(doc[:j]), doc[j]^0x20), doc[j+1:]...),
					append(bytes.Clone(doc[:j]), doc[j+1:]...),
					append(append(bytes.Clone(doc[:j+1]), doc[j]), doc[j+1:]...),
				} {
					fresh := emptyOf(c.d)
					if decode(fresh, other) != nil {
						continue
					}
					if got, err := encode(fresh); err != nil || !bytes.Equal(got, other) {
						t.Fatalf("byte %d: read, but is not how it is written: %v", j, err)
					}
				}
			}
		})
	}
}

func emptyOf(d document) document {
	switch d.(type) {
	case *Manifest:
		return &Manifest{}
	case *Head:
		return &Head{}
	case *Trace:
		return &Trace{}
	case *Condemned:
		return &Condemned{}
	case *KeysObject:
		return &KeysObject{}
	case *DomainDoc:
		return &DomainDoc{}
	}
	return &RunDoc{}
}

// TestDocumentChecks: each rule for a field, broken.
func TestDocumentChecks(t *testing.T) {
	manifest := func(change func(*Manifest)) document { m := testManifest(); change(m); return m }
	head := func(change func(*Head)) document { h := testHead(); change(h); return h }
	trace := func(change func(*Trace)) document { x := testTrace(); change(x); return x }
	condemned := func(objects ...string) document { return &Condemned{created, objects} }
	id := testIdentity(t)
	keysWith := func(change func(*KeysObject)) document {
		k := testKeys(t, nameN(1), Key{}, id)
		change(k)
		return k
	}
	long := strings.Repeat("x", 5000)
	for i, d := range []document{
		manifest(func(m *Manifest) { m.Name = "" }),
		manifest(func(m *Manifest) { m.Name = "../x" }),
		manifest(func(m *Manifest) { m.Sequence = 0 }),
		manifest(func(m *Manifest) { m.Sequence = maxNumber + 1 }),
		manifest(func(m *Manifest) { m.Created = time.Time{} }),
		manifest(func(m *Manifest) { m.Created = created.AddDate(9000, 0, 0) }),
		manifest(func(m *Manifest) { m.Domain = "a b" }),
		manifest(func(m *Manifest) { m.Description = "two\nlines" }),
		manifest(func(m *Manifest) { m.Description = "\x1b[2J" }),
		manifest(func(m *Manifest) { m.Description = "\u202egnp.exe" }),
		manifest(func(m *Manifest) { m.Description = "\xff" }),
		manifest(func(m *Manifest) { m.Description = long }),
		manifest(func(m *Manifest) { m.Architecture = "amd64" }),
		manifest(func(m *Manifest) { m.Partition = "" }),
		manifest(func(m *Manifest) { m.Filesystem = "ext 4" }),
		manifest(func(m *Manifest) { m.RootDevice = "sda1" }),
		manifest(func(m *Manifest) { m.RootDevice = "/dev/sda1 init=/bin/sh" }),
		manifest(func(m *Manifest) { m.BlockDeviceMapping[0].Virtual = "" }),
		manifest(func(m *Manifest) { m.BlockDeviceMapping = make([]Mapping, maxMappings+1) }),
		manifest(func(m *Manifest) { m.Streams = nil }),
		manifest(func(m *Manifest) { m.Streams = m.Streams[1:] }),
		manifest(func(m *Manifest) { m.Streams = append(m.Streams, m.Streams[3]) }),
		manifest(func(m *Manifest) { m.Streams = m.Streams[:2] }),
		manifest(func(m *Manifest) { m.Streams = m.Streams[:1] }),
		manifest(func(m *Manifest) { m.Streams[0].Size = -1 }),
		manifest(func(m *Manifest) { m.Streams[0].Size = maxNumber }),
		manifest(func(m *Manifest) { m.Streams[0].SHA256 = m.Streams[1].SHA256 }),
		manifest(func(m *Manifest) { m.Streams[1].SHA256 = "" }),
		manifest(func(m *Manifest) { m.Streams[1].SHA256 = strings.ToUpper(m.Streams[1].SHA256) }),
		manifest(func(m *Manifest) { m.Streams[3].Name = "Layout" }),
		manifest(func(m *Manifest) { m.Cmdline = long }),
		manifest(func(m *Manifest) { m.Index.Root.Size = 1 }),
		manifest(func(m *Manifest) { m.Index.Root.Size = MaxStoredRoot + 1 }),
		manifest(func(m *Manifest) { m.Index.Root = m.Index.Segments[1] }),
		manifest(func(m *Manifest) { m.Index.Segments[0].Size = maxStoredSegment + 1 }),
		manifest(func(m *Manifest) { m.Index.Segments[0], m.Index.Segments[1] = m.Index.Segments[1], m.Index.Segments[0] }),
		manifest(func(m *Manifest) { m.Index.Segments = nil }),
		manifest(func(m *Manifest) { m.Packs[1] = m.Packs[0] }),
		manifest(func(m *Manifest) { m.Packs[1].Size = MaxPack + 1 }),
		manifest(func(m *Manifest) { m.Packs[1].Size = minPack - 1 }),
		manifest(func(m *Manifest) { m.Packs, m.Added = nil, 0 }),
		manifest(func(m *Manifest) { m.Data = 1 << 40 }),
		manifest(func(m *Manifest) { m.Data = -1 }),
		manifest(func(m *Manifest) { m.Added = 1 << 40 }),
		manifest(func(m *Manifest) { m.Tool = "" }),
		head(func(h *Head) { h.Name = ".x" }),
		head(func(h *Head) { h.Sequence = -1 }),
		head(func(h *Head) { h.Manifest = Name{} }),
		head(func(h *Head) { h.Versions = append(h.Versions, h.Manifest) }),
		head(func(h *Head) { h.Versions = append(h.Versions, h.Versions[0]) }),
		head(func(h *Head) { h.Versions = make([]Name, MaxVersions+1) }),
		head(func(h *Head) { h.Created = time.Time{} }),
		head(func(h *Head) { h.Expires = h.Created }),
		trace(func(x *Trace) { x.Name = "" }),
		trace(func(x *Trace) { x.Created = time.Unix(0, 0) }),
		trace(func(x *Trace) { x.Ranges[0].Length = 0 }),
		trace(func(x *Trace) { x.Ranges[0].Position = -1 }),
		trace(func(x *Trace) { x.Ranges[0].Position = maxNumber }),
		trace(func(x *Trace) { x.Ranges = make([]Range, MaxRanges+1) }),
		condemned(),
		condemned("packs/00/x"),
		condemned("images/machine-1/head"),
		condemned(ManifestKey("machine-1", nameN(1))),
		condemned(KeysKey("../x", nameN(1))),
		condemned("../packs/" + PackKey(nameN(1))[6:]),
		condemned("packs/00/" + nameN(1).String()),
		condemned(PackKey(nameN(1)), PackKey(nameN(1))),
		condemned(PackKey(nameN(1)), IndexObjectKey(nameN(1))),
		&Condemned{time.Time{}, []string{PackKey(nameN(1))}},
		&RunDoc{},
		&RunDoc{Name: "x", Started: time.Unix(0, 0)},
		&KeysObject{},
		keysWith(func(k *KeysObject) { k.Recipients = append(k.Recipients, k.Recipients[0]) }),
		keysWith(func(k *KeysObject) { k.Recipients[0].Recipient += " " }),
		keysWith(func(k *KeysObject) { k.Recipients[0].Recipient = "age1" }),
		keysWith(func(k *KeysObject) { k.Recipients[0].Comment = long }),
		keysWith(func(k *KeysObject) { k.Recipients[0].Wrapped = nil }),
		keysWith(func(k *KeysObject) { k.Recipients[0].Wrapped = make([]byte, keys.MaxWrapped+1) }),
		keysWith(func(k *KeysObject) { k.Recipients = make([]Wrapped, MaxRecipients+1) }),
		&DomainDoc{Domain: "default", Sequence: 1, Created: created},
	} {
		if _, err := encode(d); !errors.Is(err, ErrUsage) || !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), d.format()) {
			t.Errorf("%d: %s written: %v", i, d.format(), err)
		}
		// The same written by somebody else is not read.
		f := &form{}
		f.document(d)
		if err := decode(emptyOf(d), f.b); !errors.Is(err, ErrFormat) {
			t.Errorf("%d: %s read: %v\n%s", i, d.format(), err, clip(string(f.b)))
		}
	}
}

// TestWholeSeconds: what a document cannot say is not cut off silently.
func TestWholeSeconds(t *testing.T) {
	m, h := testManifest(), testHead()
	m.Created, h.Expires = created.Add(1), h.Expires.Add(1)
	for _, d := range []document{m, h, &RunDoc{"x", created.Add(time.Millisecond)}} {
		if _, err := encode(d); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", d.format(), err)
		}
	}
	m.Created = Stamp(m.Created.In(time.FixedZone("east", 3600)))
	if doc, err := m.Document(); err != nil || !bytes.Contains(doc, []byte(`"created": "2026-11-22T05:30:00Z"`)) {
		t.Errorf("another time zone: %v", err)
	}
}

func TestSecretsWrapped(t *testing.T) {
	a, b, c := testIdentity(t), testIdentity(t), testIdentity(t)
	root, key := nameN(1), Key{1, 2, 3}
	k := testKeys(t, root, key, a, b)
	for _, id := range []*keys.Identity{a, b} {
		if got, err := k.IndexKey(root, c, id); err != nil || got != key {
			t.Errorf("index key: %v", err)
		}
	}
	if _, err := k.IndexKey(root, c); !errors.Is(err, keys.ErrNoIdentity) {
		t.Errorf("not a recipient: %v", err)
	}
	if _, err := k.IndexKey(nameN(2), a); !errors.Is(err, ErrOther) {
		t.Errorf("another index root: %v", err)
	}
	k.Recipients[0].Wrapped, k.Recipients[1].Wrapped = k.Recipients[1].Wrapped, k.Recipients[0].Wrapped
	if _, err := k.IndexKey(root, a); !errors.Is(err, keys.ErrNoIdentity) {
		t.Errorf("swapped: %v", err)
	}
	if _, err := WrapIndexKey(root, key, a.Recipient(), "two\nlines"); !errors.Is(err, ErrUsage) {
		t.Errorf("comment of two lines: %v", err)
	}

	d := domainDoc(t, Secret{7}, a)
	if s, err := d.Secret(b, a); err != nil || s != (Secret{7}) {
		t.Errorf("secret: %v", err)
	}
	if _, err := d.Secret(b); !errors.Is(err, keys.ErrNoIdentity) {
		t.Errorf("not a creator: %v", err)
	}
	d.Label[0] ^= 1
	if _, err := d.Secret(a); !errors.Is(err, ErrForeign) {
		t.Errorf("another label: %v", err)
	}
	d.Domain = "defaulx"
	if _, err := d.Secret(a); !errors.Is(err, ErrOther) {
		t.Errorf("another domain's secret: %v", err)
	}
	d.Domain = "other"
	if _, err := d.Secret(a); !errors.Is(err, keys.ErrWrapped) {
		t.Errorf("a domain with a name of another length: %v", err)
	}
}
