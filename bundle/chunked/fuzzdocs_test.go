package chunked

import (
	"bytes"
	"errors"
	"testing"

	"github.com/instar-image/instar/bundle/keys"
)

// fuzzDocument feeds the vectors of a kind and what comes of them to its
// parser: what is read is written as it was, and what is not read is refused
// with a class.
func fuzzDocument(f *testing.F, kind string, empty func() document) {
	for _, v := range readVectors(f) {
		if v.get("kind") != kind {
			continue
		}
		doc, _, err := Split(v.body)
		if err != nil {
			doc = v.body
		}
		f.Add(doc)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		d := empty()
		if err := decode(d, doc); err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrLimit) {
				t.Fatalf("no class: %v", err)
			}
			return
		}
		if again, err := encode(d); err != nil || !bytes.Equal(again, doc) {
			t.Fatalf("it is written otherwise: %v\n%s", err, again)
		}
	})
}

func FuzzManifest(f *testing.F) {
	fuzzDocument(f, "manifest", func() document { return &Manifest{} })
}

func FuzzHead(f *testing.F) {
	fuzzDocument(f, "head", func() document { return &Head{} })
}

func FuzzDomain(f *testing.F) {
	fuzzDocument(f, "domain", func() document { return &DomainDoc{} })
}

func FuzzKeys(f *testing.F) {
	fuzzDocument(f, "keys", func() document { return &KeysObject{} })
}

func FuzzTrace(f *testing.F) {
	fuzzDocument(f, "trace", func() document { return &Trace{} })
}

func FuzzCondemned(f *testing.F) {
	fuzzDocument(f, "condemned", func() document { return &Condemned{} })
}

func FuzzRun(f *testing.F) {
	fuzzDocument(f, "run", func() document { return &RunDoc{} })
}

// FuzzSigned looks for a signed object that is accepted and is not what was
// signed.
func FuzzSigned(f *testing.F) {
	signed := map[string]bool{}
	var trust *keys.AllowedSigners
	for _, v := range readVectors(f) {
		if v.get("kind") == "manifest" {
			f.Add(v.body)
			if v.file == "manifest-of-all-fields" {
				trust = v.trust(f)
			}
			signed[string(v.body)] = true
		}
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		if v, err := Verify(object, NamespaceImage, trust, "machine-1"); err == nil {
			if !signed[string(object)] || !bytes.HasPrefix(object, v.Doc) {
				t.Fatal("forged")
			}
		}
	})
}
