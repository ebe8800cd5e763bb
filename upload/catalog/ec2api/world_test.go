package ec2api_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

const (
	alice = "111111111111"
	bob   = "222222222222"
	carol = "333333333333"

	region = "test-1"
	secret = "a secret of at least eight"
)

// accountsYAML has a key for each account, named after it, and one that may
// only read.
const accountsYAML = `
accounts:
  - id: "111111111111"
    instances: [i-a*]
    buckets: [alice-*]
    keys:
      - {access-key-id: KEYALICE, secret-access-key: a secret of at least eight}
      - {access-key-id: KEYREADER, secret-access-key: a secret of at least eight, read-only: true}
  - id: "222222222222"
    instances: [i-b*]
    buckets: [bob-*]
    keys: [{access-key-id: KEYBOB, secret-access-key: a secret of at least eight}]
  - id: "333333333333"
    keys: [{access-key-id: KEYCAROL, secret-access-key: a secret of at least eight}]
`

var keyOf = map[string]string{alice: "KEYALICE", bob: "KEYBOB", carol: "KEYCAROL"}

// world is an API over a catalog in a directory.
type world struct {
	t       testing.TB
	store   upload.Store
	catalog *catalog.Catalog
	signer  keys.Signer
	trust   *keys.AllowedSigners
	tasks   *tasks.Queue
	api     *ec2api.Server
	now     time.Time
	records []ec2api.Record
}

func newWorld(t testing.TB) *world {
	t.Helper()
	store, err := upload.OpenDir(t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	signer, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: store, signer: signer, now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	w.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Namespaces: catalog.Namespace + "," + tasks.Namespace, Key: signer.Public()})
	clock := func() time.Time { return w.now }
	w.catalog, err = catalog.Open(store, catalog.Options{Trust: w.trust, Signer: signer, Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.catalog.Create(t.Context(), region); err != nil {
		t.Fatal(err)
	}
	w.tasks = tasks.Open(tasks.Options{Store: store, Signer: signer, Signers: w.trust, Now: clock})
	file := filepath.Join(t.TempDir(), "accounts.yaml")
	if err := os.WriteFile(file, []byte(accountsYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	accounts, err := ec2api.ReadAccounts(file)
	if err != nil {
		t.Fatal(err)
	}
	w.api, err = ec2api.New(ec2api.Options{
		Catalog: w.catalog, Accounts: func() *ec2api.Accounts { return accounts }, Region: region, Tasks: w.tasks, Now: clock,
		Report: func(r *ec2api.Record) { w.records = append(w.records, *r) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// reply is an answer.
type reply struct {
	Status int
	Code   string // of an error
	Body   string
}

// first is the text of the first element of that name.
func (r reply) first(name string) string {
	if l := r.all(name); len(l) > 0 {
		return l[0]
	}
	return ""
}

// all are the texts of the elements of that name.
func (r reply) all(name string) (out []string) {
	for d := xml.NewDecoder(strings.NewReader(r.Body)); ; {
		tok, err := d.Token()
		if err != nil {
			return out
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == name {
			var text string
			if err := d.DecodeElement(&text, &s); err == nil {
				out = append(out, text)
			}
		}
	}
}

// sign makes a request by the AWS SDK's signer.
func (w *world) sign(key, service, form string) *http.Request {
	r := httptest.NewRequestWithContext(context.Background(), "POST", "http://127.0.0.1:8773/", strings.NewReader(form))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	sum := sha256.Sum256([]byte(form))
	err := v4.NewSigner().SignHTTP(context.Background(), aws.Credentials{AccessKeyID: key, SecretAccessKey: secret}, r, hex.EncodeToString(sum[:]), service, region, w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// as asks in the name of an account (or by a key, if it is none). pairs are
// names and values.
func (w *world) as(account, action string, pairs ...string) reply {
	key := keyOf[account]
	if key == "" {
		key = account
	}
	v := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for i := 0; i+1 < len(pairs); i += 2 {
		v.Set(pairs[i], pairs[i+1])
	}
	service := "ec2"
	if action == "GetCallerIdentity" {
		service = "sts"
	}
	return w.do(w.sign(key, service, v.Encode()))
}

func (w *world) do(r *http.Request) reply {
	rec := httptest.NewRecorder()
	w.api.ServeHTTP(rec, r)
	b, _ := io.ReadAll(rec.Body)
	out := reply{Status: rec.Code, Body: string(b)}
	if rec.Code != http.StatusOK {
		out.Code = out.first("Code")
	}
	return out
}

// want asks and demands an answer of that code, "" for one that is no error.
func (w *world) want(code, account, action string, pairs ...string) reply {
	w.t.Helper()
	r := w.as(account, action, pairs...)
	if r.Code != code {
		w.t.Errorf("%s by %s %q: %d %s, want %q\n%s", action, account, pairs, r.Status, r.Code, code, r.Body)
	}
	return r
}

// register registers an image without bytes.
func (w *world) register(account, name string, pairs ...string) string {
	w.t.Helper()
	r := w.want("", account, "RegisterImage", append([]string{"Name", name, "RootDeviceName", "/dev/sda1", "Architecture", "x86_64"}, pairs...)...)
	id := r.first("imageId")
	if id == "" {
		w.t.Fatalf("no id in %s", r.Body)
	}
	return id
}
