package ec2

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"

	"go.uber.org/goleak"

	"github.com/instar-image/instar/bundle/sparse"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func extent(off, n int64) sparse.Extent { return sparse.Extent{Off: off, Len: n} }

// Same image, key and randomness: the same bytes, however the goroutines run.
func TestDeterministic(t *testing.T) {
	data := patchwork(150_000, 9)
	o := options(t)
	o.PartSize = 16 << 10
	key, iv := BlockKey{1}, BlockKey{2}
	o.EncKey, o.EncIV = &key, &iv
	var doc0 []byte
	var parts0 map[string][]byte
	for i := range 100 {
		cryptotest.SetGlobalRandom(t, 7)
		o.Workers, o.InFlight = 1+i%4, 1+i%3
		store := newMemStore()
		_, doc, err := Bundle(t.Context(), o, memoryImage("img", data, nil), store)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			doc0, parts0 = doc, store.parts
			continue
		}
		if !bytes.Equal(doc, doc0) || !maps.EqualFunc(store.parts, parts0, bytes.Equal) {
			t.Fatalf("run %d gives another bundle", i)
		}
	}
}

func TestTwoBundlesHaveDifferentKeys(t *testing.T) {
	a, b := newMemStore(), newMemStore()
	for _, s := range []*memStore{a, b} {
		if _, _, err := Bundle(t.Context(), options(t), memoryImage("img", make([]byte, 5000), nil), s); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(a.parts["img.part.0"], b.parts["img.part.0"]) {
		t.Error("the same image was encrypted to the same bytes twice")
	}
}

func TestPartNames(t *testing.T) {
	data := patchwork(500_000, 2)
	for _, c := range []struct {
		name   string
		naming Naming
		rename bool
		size   int
		first  string
	}{
		{"one part, renamed", NamingEC2, true, 0, "img.part.0"},
		{"one part, euca", NamingEuca, true, 0, "img.part.00"},
		{"many, renamed", NamingEC2, true, 32 << 10, "img.part.00"},
		{"zeros, worst case 13", NamingEC2, false, 16 << 10, "img.part.00"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(t)
			o.Naming, o.PartSize = c.naming, c.size
			d := data
			if strings.HasPrefix(c.name, "zeros") {
				d = make([]byte, 200_000)
			}
			mem := newMemStore()
			var sink PartSink = mem
			if c.rename {
				sink = renamingStore{mem}
			}
			m, _, err := Bundle(t.Context(), o, memoryImage("img", d, nil), sink)
			if err != nil {
				t.Fatal(err)
			}
			if m.Parts[0].Filename != c.first {
				t.Errorf("first part is %q, want %q", m.Parts[0].Filename, c.first)
			}
			var listed []string
			for _, p := range m.Parts {
				listed = append(listed, p.Filename)
			}
			if stored := slices.Sorted(maps.Keys(mem.parts)); !slices.Equal(stored, listed) {
				t.Errorf("stored %v, listed %v", stored, listed)
			}
		})
	}
}

func TestBundleRefusesOptions(t *testing.T) {
	good := memoryImage("img", []byte("x"), nil)
	for name, change := range map[string]func(*BundleOptions, *Image){
		"no arch":         func(o *BundleOptions, _ *Image) { o.Arch = "" },
		"no account":      func(o *BundleOptions, _ *Image) { o.Account = "" },
		"account":         func(o *BundleOptions, _ *Image) { o.Account = "1234-5678" },
		"type":            func(o *BundleOptions, _ *Image) { o.Type = "toaster" },
		"no cloud":        func(o *BundleOptions, _ *Image) { o.EC2Cert = nil },
		"part size small": func(o *BundleOptions, _ *Image) { o.PartSize = 4080 },
		"part size odd":   func(o *BundleOptions, _ *Image) { o.PartSize = 10000001 },
		"part size large": func(o *BundleOptions, _ *Image) { o.PartSize = MaxPartSize + 16 },
		"mapping":         func(o *BundleOptions, _ *Image) { o.BlockDeviceMapping = []Mapping{{"ami", ""}} },
		"control":         func(o *BundleOptions, _ *Image) { o.KernelID = "a\x00" },
		"not utf-8":       func(o *BundleOptions, _ *Image) { o.RamdiskID = "a\xff" },
		"name":            func(_ *BundleOptions, i *Image) { i.Name = "a/b" },
		"no name":         func(_ *BundleOptions, i *Image) { i.Name = "" },
		"long name":       func(_ *BundleOptions, i *Image) { i.Name = strings.Repeat("n", 250) },
		"empty":           func(_ *BundleOptions, i *Image) { i.Size = 0 },
		"negative":        func(_ *BundleOptions, i *Image) { i.Size = -1 },
		"map":             func(_ *BundleOptions, i *Image) { i.Map = sparse.Map{{Off: 0, Len: 2}} },
	} {
		o, img := options(t), good
		change(&o, &img)
		store := newMemStore()
		_, _, err := Bundle(t.Context(), o, img, store)
		if !errors.Is(err, ErrOption) || len(store.parts) > 0 {
			t.Errorf("%s: %v, %d parts", name, err, len(store.parts))
		}
	}
}

// Without the user's certificate and key the manifest is as euca2ools makes
// it: empty elements and UNSIGNED.
func TestBundleUnsigned(t *testing.T) {
	cloud := loadParty(t, "ec2")
	o := options(t)
	o.UserCert, o.Key = nil, nil
	store := newMemStore()
	_, doc, err := Bundle(t.Context(), o, memoryImage("img", []byte("x"), nil), store)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<user_encrypted_key algorithm='AES-128-CBC'/>", "<user_encrypted_iv/>", "<signature>UNSIGNED</signature>"} {
		if !bytes.Contains(doc, []byte(want)) {
			t.Errorf("no %s in %s", want, doc)
		}
	}
	m := parsed(t, doc)
	if _, err := unbundleBytes(t, UnbundleOptions{Key: cloud.key}, m, store); !errors.Is(err, ErrUnsigned) {
		t.Errorf("not allowed: %v", err)
	}
	if b, err := unbundleBytes(t, UnbundleOptions{Key: cloud.key, AllowUnsigned: true}, m, store); err != nil || string(b) != "x" {
		t.Errorf("allowed: %v", err)
	}
}

// The document is laid out as ec2-ami-tools does, field for field.
func TestDocumentLayout(t *testing.T) {
	want, err := os.ReadFile(fixture("ec2-full", "web-1.0.manifest.xml"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseManifest(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.encode(loadParty(t, "user").key)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	m.Name, m.Ancestors, m.KernelName = "a&b<c>d'e\"é", []string{"ami-1", "ami-2"}, "vmlinuz"
	doc, err := m.encode(loadParty(t, "user").key)
	if err != nil {
		t.Fatal(err)
	}
	if want := "<name>a&amp;b&lt;c&gt;d&apos;e&quot;é</name><user>123456789012</user><type>machine</type><kernel_name>vmlinuz</kernel_name><ancestry><ancestor_ami_id>ami-1</ancestor_ami_id><ancestor_ami_id>ami-2</ancestor_ami_id></ancestry><digest"; !bytes.Contains(doc, []byte(want)) {
		t.Errorf("no %s in\n%s", want, doc)
	}
	again, err := ParseManifest(doc)
	if err != nil || again.Name != m.Name {
		t.Errorf("read back: %+v, %v", again, err)
	}
}

func TestVerifyReports(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	trust := []*rsa.PublicKey{f.user.pub()}
	bad := maps.Clone(good.parts)
	bad[m.Parts[1].Filename] = []byte("x")
	delete(bad, m.Parts[2].Filename)
	for _, c := range []struct {
		name     string
		o        VerifyOptions
		parts    map[string][]byte
		sig, arc string
		objects  []string
	}{
		{"shallow", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}}, good.parts, "good", "not checked", nil},
		{"deep", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust, Key: f.cloud.key}}, good.parts, "good", "good", nil},
		{"manifest only", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}, ManifestOnly: true}, nil, "good", "not checked", nil},
		{"nobody trusted", VerifyOptions{}, good.parts, "bad", "not checked", []string{"manifest"}},
		{"two bad parts", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}}, bad, "good", "not checked", []string{objPart(m.Parts[1].Filename), objPart(m.Parts[2].Filename)}},
		{"two bad parts, deep", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust, Key: f.user.key}}, bad, "good", "bad", []string{objPart(m.Parts[1].Filename), objPart(m.Parts[2].Filename)}},
	} {
		r, err := Verify(t.Context(), c.o, m, mapSource(c.parts))
		var objects []string
		for _, p := range r.Problems {
			objects = append(objects, p.Object)
		}
		if r.Signature != c.sig || r.Archive != c.arc || !slices.Equal(objects, c.objects) || (err == nil) != (len(objects) == 0) {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		if r.Signature == "good" && r.Signer != Fingerprint(f.user.pub()) {
			t.Errorf("%s: signer %s", c.name, r.Signer)
		}
	}
	wrong := *m
	wrong.Digest[0]++
	if r, err := Verify(t.Context(), VerifyOptions{UnbundleOptions: UnbundleOptions{Key: f.user.key}}, &wrong, mapSource(good.parts)); !errors.Is(err, ErrDigest) || r.Archive != "bad" || r.PartsGood != len(m.Parts) {
		t.Errorf("archive's digest: %+v, %v", r, err)
	}
}

func TestEncryptedManifestSchemeOne(t *testing.T) {
	f := newForge(t)
	key, err := rsa.GenerateKey(nil, 1024)
	if err != nil {
		t.Fatal(err)
	}
	doc := f.good(t).doc
	enc := f.encryptedManifest(t, &key.PublicKey, 1, doc)
	got, err := DecryptManifest(enc, key)
	if err != nil || !bytes.Equal(got, doc) {
		t.Errorf("%v", err)
	}
	if _, err := DecryptManifest(doc, key); !errors.Is(err, ErrFormat) {
		t.Errorf("not encrypted: %v", err)
	}
}

func TestErrorsReadWell(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	bad := maps.Clone(good.parts)
	bad["img.part.01"] = nil
	err := Unbundle(t.Context(), UnbundleOptions{Key: f.user.key}, m, mapSource(bad), &nowhere{})
	want := fmt.Sprintf(`unbundling "img": part "img.part.01": its 0 bytes have SHA-1 da39a3ee5e6b4b0d3255bfef95601890afd80709, the manifest says %s: damaged, or not this bundle's`, m.Parts[1].SHA1)
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
