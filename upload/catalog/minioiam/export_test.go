package minioiam

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

var names = []string{"policies", "users", "groups", "svcaccts", "user_mappings", "group_mappings", "stsuser_mappings"}

// made makes an export of files' contents; those not named are {}.
func made(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, n := range names {
		text, ok := files[n]
		if text == "-" {
			continue
		}
		if !ok {
			text = "{}"
		}
		w, err := z.Create("iam-assets/" + n + ".json")
		if err == nil {
			_, err = w.Write([]byte(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var now = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)

func text(keys []Key) string {
	var l []string
	for _, k := range keys {
		s := k.ID + ":" + k.Secret + ":" + strings.Join(k.Policies, "+")
		if k.Parent != "" {
			s += " of " + k.Parent
		}
		if k.Narrowed {
			s += " narrowed"
		}
		if !k.Expires.IsZero() {
			s += " until " + k.Expires.UTC().Format(time.DateOnly)
		}
		l = append(l, s)
	}
	return strings.Join(l, "\n")
}

func TestRead(t *testing.T) {
	const policies = `{"p":{},"q":{},"r":{}}`
	for _, x := range []struct {
		name  string
		files map[string]string
		want  []string
	}{
		{"none", nil, nil},
		{"a user's own policies, of those there are", map[string]string{
			"policies": policies, "users": `{"u":{"secretKey":"s","status":"enabled"}}`, "user_mappings": `{"u":{"version":1,"policy":"q, p,gone,"}}`,
		}, []string{"u:s:p+q"}},
		{"a user who is disabled", map[string]string{
			"policies": policies, "users": `{"u":{"secretKey":"s","status":"disabled"},"v":{"secretKey":"s","status":""}}`, "user_mappings": `{"u":{"policy":"p"}}`,
		}, nil},
		{"groups' policies", map[string]string{
			"policies": policies, "users": `{"u":{"secretKey":"s","status":"enabled"},"v":{"secretKey":"s","status":"enabled"}}`,
			"groups":        `{"g":{"status":"enabled","members":["u"]},"h":{"status":"enabled","members":["u","v"]}}`,
			"user_mappings": `{"u":{"policy":"p"}}`, "group_mappings": `{"g":{"policy":"q"},"h":{"policy":"r"}}`,
		}, []string{"u:s:p+q+r", "v:s:r"}},
		{"a group that is disabled takes all", map[string]string{
			"policies": policies, "users": `{"u":{"secretKey":"s","status":"enabled"}}`,
			"groups":        `{"g":{"status":"disabled","members":["u"]},"h":{"status":"enabled","members":["u"]}}`,
			"user_mappings": `{"u":{"policy":"p"}}`, "group_mappings": `{"g":{"policy":"q"},"h":{"policy":"r"}}`,
		}, []string{"u:s:"}},
		{"service accounts", map[string]string{
			"policies": policies, "users": `{"u":{"secretKey":"s","status":"enabled"},"off":{"secretKey":"s","status":"disabled"}}`,
			"user_mappings": `{"u":{"policy":"p"},"off":{"policy":"p"}}`,
			"svcaccts": `{
				"A":{"parent":"u","secretKey":"a","status":"on","sessionPolicy":null,"claims":{"sa-policy":"inherited-policy"},"expiration":"1970-01-01T00:00:00Z"},
				"B":{"parent":"u","secretKey":"b","status":"off","expiration":"1970-01-01T00:00:00Z"},
				"C":{"parent":"u","secretKey":"c","status":"on","expiration":"2027-03-02T00:00:00Z"},
				"D":{"parent":"u","secretKey":"d","status":"on","expiration":"2027-03-01T12:00:00Z"},
				"E":{"parent":"off","secretKey":"e","status":"on"},
				"F":{"parent":"root","secretKey":"f","status":"on"},
				"G":{"parent":"u","secretKey":"g","status":"on","sessionPolicy":{"Version":"2012-10-17","Statement":[]},"claims":{"sa-policy":"embedded-policy"}},
				"H":{"parent":"u","secretKey":"h","status":"on","sessionPolicy":{},"claims":{"sa-policy":"embedded-policy"}},
				"I":{"parent":"u","secretKey":"i","status":"on","sessionPolicy":"?"}}`,
		}, []string{"A:a:p of u", "C:c:p of u until 2027-03-02", "F:f: of root", "G:g:p of u narrowed", "H:h:p of u", "I:i:p of u narrowed", "u:s:p"}},
		{"of a user of a directory", map[string]string{
			"policies": policies, "stsuser_mappings": `{"uid=u,dc=x":{"policy":"p"}}`, "group_mappings": `{"cn=g,dc=x":{"policy":"q"}}`,
			"svcaccts": `{"A":{"parent":"uid=u,dc=x","secretKey":"a","status":"on","groups":["cn=g,dc=x","cn=h,dc=x"]}}`,
		}, []string{"A:a:p+q of uid=u,dc=x"}},
	} {
		keys, err := Read(made(t, x.files), now)
		if err != nil {
			t.Errorf("%s: %v", x.name, err)
			continue
		}
		if got := text(keys); got != strings.Join(x.want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", x.name, got, strings.Join(x.want, "\n"))
		}
		for _, k := range keys {
			if s := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(s, k.Secret+":") || !strings.Contains(s, "key "+k.ID) {
				t.Errorf("%s: a key is printed as %s", x.name, s)
			}
		}
	}
}

func TestReadWhatIsNone(t *testing.T) {
	whole := made(t, nil)
	for name, data := range map[string][]byte{
		"nothing": nil, "no zip": []byte("<Error/>"), "cut": whole[:len(whole)-1],
		"a file missing": made(t, map[string]string{"groups": "-"}), "no JSON": made(t, map[string]string{"users": `{"u":{"secretKey":"hidden-secret"`}),
		"another form": made(t, map[string]string{"users": `["hidden-secret"]`}),
	} {
		if _, err := Read(data, now); !errors.Is(err, ErrExport) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: %v", name, err)
		}
	}
	bomb := made(t, map[string]string{"users": `{"a":"` + strings.Repeat(" ", MaxExport) + `"}`})
	if len(bomb) > 1<<20 {
		t.Fatalf("the bomb has %d bytes", len(bomb))
	}
	if _, err := Read(bomb, now); !errors.Is(err, ErrExport) || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a file without end: %v", err)
	}
}

// TestReadReal: an export that a MinIO made, of users, groups, policies and
// service accounts that its own administrator's API made (testdata/README).
func TestReadReal(t *testing.T) {
	data, err := os.ReadFile("testdata/export.zip")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := Read(data, time.Date(2026, 11, 22, 13, 0, 0, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	const want = `SVCANNA:the-secret-of-SVCANNA:instar-account-111122223333+readwrite of anna
SVCNARROW:the-secret-of-SVCNARROW:instar-account-111122223333+readwrite of anna narrowed
SVCROOT:the-secret-of-SVCROOT: of AK3E8D76A0E7590E8C
SVCTEAM:the-secret-of-SVCTEAM:instar-account-222233334444 of anders until 2026-11-23
anders:the-secret-of-anders:instar-account-222233334444
anna:the-secret-of-anna:instar-account-111122223333+readwrite
both:the-secret-of-both:instar-account-111122223333+instar-account-222233334444
instar-catalog:the-secret-of-instar-catalog:exports
jane@example.com:the-secret-of-jane@example.com:instar-account-222233334444
nobody:the-secret-of-nobody:readwrite
other-group:the-secret-of-other-group:
reader:the-secret-of-reader:instar-account-111122223333-read-only`
	if got := text(keys); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// FuzzRead: anything is read or refused, and what is read can be used.
func FuzzRead(f *testing.F) {
	f.Add(made(f, nil))
	f.Add(made(f, map[string]string{"users": `{"u":{"secretKey":"s","status":"enabled"}}`, "svcaccts": `{"A":{"parent":"u","status":"on","expiration":"2030-01-01T00:00:00Z"}}`}))
	data, err := os.ReadFile("testdata/export.zip")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := Read(data, now)
		if err != nil && !errors.Is(err, ErrExport) {
			t.Fatal(err)
		}
		for i, k := range keys {
			if i > 0 && keys[i-1].ID > k.ID {
				t.Fatalf("%q before %q", keys[i-1].ID, k.ID)
			}
			if !k.Expires.IsZero() && !now.Before(k.Expires) {
				t.Fatalf("%q has ended", k.ID)
			}
		}
	})
}
