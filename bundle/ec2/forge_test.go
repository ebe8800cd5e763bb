package ec2

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/sparse"
)

// A forge makes small bundles of any shape, good and bad, without the code
// under test where that matters. It is deterministic: key, IV and their
// encrypted forms are those of fixtures/ec2-basic.
type forge struct {
	user, cloud party
	base        *Manifest // of fixtures/ec2-basic
	key, iv     BlockKey
	image       []byte
}

func newForge(t testing.TB) *forge {
	f := &forge{user: loadParty(t, "user"), cloud: loadParty(t, "ec2"), base: readManifest(t, fixture("ec2-basic", "fx.img.manifest.xml"))}
	var err error
	if f.key, err = ParseBlockKey("06d29d3b1af48ac877b05c7d0667a170"); err != nil {
		t.Fatal(err)
	}
	if f.iv, err = ParseBlockKey("7a36668d9e648cb57e14c12e5148a3b4"); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	f.image = make([]byte, 700)
	for i := range f.image[:300] {
		f.image[i] = byte(r.Uint32())
	}
	return f
}

// bundle is a manifest as bytes and parts by name.
type bundle struct {
	doc   []byte
	parts map[string][]byte
}

// tar is the archive of f's image as a plain member.
func (f *forge) tar() []byte {
	m := member{name: "img", size: int64(len(f.image)), data: sparse.Dense(int64(len(f.image))), mtime: time.Unix(0, 0), mode: 0o644}
	return tarOf(m.header(), f.image)
}

// tarOf puts header, data, padding and trailer together.
func tarOf(header, data []byte) []byte {
	b := append(bytes.Clone(header), data...)
	b = append(b, make([]byte, (tarBlock-len(b)%tarBlock)%tarBlock)...)
	b = append(b, make([]byte, 2*tarBlock)...)
	return append(b, make([]byte, (tarRecord-len(b)%tarRecord)%tarRecord)...)
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		panic(err)
	}
	if err := z.Close(); err != nil {
		panic(err)
	}
	return out.Bytes()
}

// encrypted is PKCS#7 and CBC.
func (f *forge) encrypted(b []byte) []byte {
	n := aes.BlockSize - len(b)%aes.BlockSize
	out := append(bytes.Clone(b), bytes.Repeat([]byte{byte(n)}, n)...)
	return f.cbc(out)
}

func (f *forge) cbc(b []byte) []byte {
	block, err := aes.NewCipher(f.key[:])
	if err != nil {
		panic(err)
	}
	cipher.NewCBCEncrypter(block, f.iv[:]).CryptBlocks(b, b)
	return b
}

// make splits the ciphertext e into parts of n bytes and signs a manifest,
// after change had a go at it.
func (f *forge) make(t testing.TB, tarDigest SHA1, e []byte, n int, change func(*Manifest)) bundle {
	t.Helper()
	m := *f.base
	m.Name, m.Digest, m.Size, m.BundledSize, m.Parts = "img", tarDigest, int64(len(f.image)), int64(len(e)), nil
	b := bundle{parts: make(map[string][]byte)}
	for i := 0; i == 0 || len(e) > 0; i++ {
		k := min(n, len(e))
		name := fmt.Sprintf("img.part.%02d", i)
		b.parts[name] = e[:k]
		m.Parts = append(m.Parts, ManifestPart{name, sha1.Sum(e[:k])})
		e = e[k:]
	}
	if change != nil {
		change(&m)
	}
	var err error
	if b.doc, err = m.encode(f.user.key); err != nil {
		t.Fatal(err)
	}
	return b
}

// good is the ordinary bundle: several parts.
func (f *forge) good(t testing.TB) bundle {
	return f.archive(t, f.tar(), nil)
}

// archive is a bundle of any archive.
func (f *forge) archive(t testing.TB, tar []byte, change func(*Manifest)) bundle {
	return f.make(t, sha1.Sum(tar), f.encrypted(gzipped(tar)), 96, change)
}

// resign signs the bytes of doc as a peer would find them: by a search for
// the first opening and closing tags.
func (f *forge) resign(doc []byte) []byte {
	return f.signWith(doc, rawSigned(doc), f.user.key, crypto.SHA1)
}

func (f *forge) signWith(doc, over []byte, key *rsa.PrivateKey, h crypto.Hash) []byte {
	d := h.New()
	d.Write(over)
	sig, err := rsa.SignPKCS1v15(nil, key, h, d.Sum(nil))
	if err != nil {
		panic(err)
	}
	return setSignature(doc, hex.EncodeToString(sig))
}

// rawSigned is what the peers sign and verify.
func rawSigned(doc []byte) []byte {
	slice := func(name string) []byte {
		i := bytes.Index(doc, []byte("<"+name+">"))
		j := bytes.Index(doc, []byte("</"+name+">"))
		if i < 0 || j < i {
			return nil
		}
		return doc[i : j+len(name)+3]
	}
	return append(bytes.Clone(slice("machine_configuration")), slice("image")...)
}

func setSignature(doc []byte, text string) []byte {
	i := bytes.LastIndex(doc, []byte("<signature>"))
	j := bytes.LastIndex(doc, []byte("</signature>"))
	if i < 0 || j < i {
		return doc
	}
	return []byte(string(doc[:i+11]) + text + string(doc[j:]))
}

// edit replaces the first old by new; the old must be there.
func edit(doc []byte, old, new string) []byte {
	if !bytes.Contains(doc, []byte(old)) {
		panic(fmt.Sprintf("%q is not in the document", old))
	}
	return []byte(strings.Replace(string(doc), old, new, 1))
}

// between is the text from the first a up to and including the next b.
func between(doc []byte, a, b string) string {
	s := string(doc)
	i := strings.Index(s, a)
	j := i + strings.Index(s[i:], b)
	return s[i : j+len(b)]
}
