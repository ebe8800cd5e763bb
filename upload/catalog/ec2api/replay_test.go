package ec2api_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// recorded is a request that the AWS SDK for Go made, and what it made of the
// answer: a line of testdata/sdk.jsonl, which test/catalogsdk writes.
type recorded struct {
	At      time.Time         `json:"at"`
	Region  string            `json:"region"`
	Action  string            `json:"action"`
	Method  string            `json:"method"`
	Path    string            `json:"path"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`

	Made   string `json:"made"`
	Lost   bool   `json:"lost"`
	Waited bool   `json:"waited"`
	Status int    `json:"status"`
	Code   string `json:"code"`
	Output any    `json:"output"`
}

// inBucket is a directory that says it is a prefix of a bucket.
type inBucket struct {
	upload.Store
	bucket string
}

func (b inBucket) Bucket() string                             { return b.bucket }
func (b inBucket) String() string                             { return "s3://" + b.bucket + "/fleet" }
func (b inBucket) Location(context.Context) (string, error)   { return "", nil }
func (b inBucket) CreateBucket(context.Context, string) error { return nil }
func (b inBucket) DeleteBucket(context.Context) error         { return nil }

// Put stores an object without the tags that a directory does not know.
func (b inBucket) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (upload.Object, error) {
	o.Tags = nil
	return b.Store.Put(ctx, key, body, size, o)
}

// PutStream is Put for what is not known in advance.
func (b inBucket) PutStream(ctx context.Context, key string, r io.Reader, o upload.PutOptions) (upload.Object, error) {
	o.Tags = nil
	return b.Store.PutStream(ctx, key, r, o)
}

// replay is two regions' servers at the times of the record, which draw the ids
// they drew then.
type replay struct {
	t       *testing.T
	regions map[string]*place
	same    sameness

	mu   sync.Mutex // Work asks for time and ids too
	now  time.Time
	next string // the id that is drawn next, "" for any
}

// place is one region.
type place struct {
	api     *ec2api.Server
	catalog *catalog.Catalog
	agent   *tasks.Queue
}

func (r *replay) clock() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

// newID gives the id of the record once.
func (r *replay) newID(prefix string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id := r.next; id != "" && strings.HasPrefix(id, prefix) {
		r.next = ""
		return id
	}
	return fmt.Sprintf("%s%017x", prefix, time.Now().UnixNano())
}

func newReplay(t *testing.T, at time.Time) *replay {
	t.Helper()
	r := &replay{t: t, regions: map[string]*place{}, same: sameness{then: map[string]string{}}, now: at}
	dir := t.TempDir()
	signer, err := keys.WriteSigningKey(filepath.Join(dir, "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	trust := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Namespaces: catalog.Namespace + "," + tasks.Namespace, Key: signer.Public()})
	file := filepath.Join(dir, "accounts.yaml")
	text, err := os.ReadFile("testdata/sdk-accounts.yaml") // those of test/catalog, where the record is made
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	accounts, err := ec2api.ReadAccounts(file)
	if err != nil {
		t.Fatal(err)
	}
	bucket := func(_ context.Context, name string) (upload.Store, error) {
		s, err := upload.OpenDir(filepath.Join(dir, name), true)
		return inBucket{s, name}, err
	}
	names := map[string]string{"eu-home-1": "cat-here", "us-home-1": "cat-there"}
	for name, in := range names {
		if err := os.MkdirAll(filepath.Join(dir, in, "fleet"), 0o755); err != nil {
			t.Fatal(err)
		}
		store, err := upload.OpenDir(filepath.Join(dir, in, "fleet"), false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		p := &place{}
		p.catalog, err = catalog.Open(inBucket{store, in}, catalog.Options{
			Trust: trust, Signer: signer, Bucket: bucket, Now: r.clock, NewID: func(prefix string) (string, error) { return r.newID(prefix + "-"), nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.catalog.Create(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		p.agent = tasks.Open(tasks.Options{Store: store, Signer: signer, Signers: trust, Now: r.clock, NewID: r.newID})
		var others []ec2api.Region
		for n := range names {
			if n != name {
				others = append(others, ec2api.Region{Name: n, Endpoint: "127.0.0.1"})
			}
		}
		p.api, err = ec2api.New(ec2api.Options{
			Catalog: p.catalog, Accounts: func() *ec2api.Accounts { return accounts }, Region: name, Tasks: p.agent, Now: r.clock, Regions: others,
			Sources: func(_ context.Context, region string) (*catalog.Catalog, error) {
				if from := r.regions[region]; from != nil {
					return from.catalog, nil
				}
				return nil, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		r.regions[name] = p
	}
	fixture, err := filepath.Glob("../../../bundle/ec2/testdata/fixtures/ec2-full/*")
	if err != nil || len(fixture) < 3 {
		t.Fatal(fixture, err)
	}
	if err := os.Mkdir(filepath.Join(dir, "cat-here/bundles"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range fixture {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cat-here/bundles", filepath.Base(f)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// send has the server answer a request as it came in.
func (r *replay) send(l *recorded) (int, []byte) {
	r.t.Helper()
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", l.Method, l.Path)
	for _, name := range slices.Sorted(maps.Keys(l.Headers)) {
		if name != "Content-Length" {
			fmt.Fprintf(&b, "%s: %s\r\n", name, l.Headers[name])
		}
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(l.Body), l.Body)
	req, err := http.ReadRequest(bufio.NewReader(&b))
	if err != nil {
		r.t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	r.regions[l.Region].api.ServeHTTP(rec, req.WithContext(r.t.Context()))
	body, err := io.ReadAll(rec.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return rec.Code, body
}

// wrong says how an answer differs from what the SDK had, "" if it does not.
func (r *replay) wrong(l *recorded, status int, body []byte) string {
	if status != l.Status {
		return fmt.Sprintf("status %d, the SDK had %d", status, l.Status)
	}
	root, err := parseXML(body)
	if err != nil {
		return err.Error()
	}
	if status != http.StatusOK {
		code := root.find("Code")
		if code == nil || l.Code != "" && code.text != l.Code {
			return fmt.Sprintf("error %v, the SDK had %s", code, l.Code)
		}
		return ""
	}
	if l.Lost { // the next one says what it was
		return ""
	}
	return r.same.answer(l.Action, root, l.Output)
}

// answered sends a request until it is answered as it was, which if a waiter ends
// with it takes what is done in the background, and that an agent does what it is
// asked.
func (r *replay) answered(l *recorded) (int, []byte, string) {
	r.t.Helper()
	status, body := r.send(l)
	wrong := r.wrong(l, status, body)
	if wrong == "" || !l.Waited {
		return status, body, wrong
	}
	p := r.regions[l.Region]
	r.agent(p)
	ctx, stop := context.WithCancel(r.t.Context())
	var failed []error
	var wg sync.WaitGroup
	wg.Go(func() {
		var mu sync.Mutex
		p.api.Work(ctx, time.Hour, func(err error) {
			mu.Lock()
			defer mu.Unlock()
			failed = append(failed, err)
		})
	})
	for begun := time.Now(); wrong != "" && time.Since(begun) < time.Minute; time.Sleep(10 * time.Millisecond) {
		status, body = r.send(l)
		wrong = r.wrong(l, status, body)
	}
	stop()
	wg.Wait()
	if wrong != "" {
		wrong += fmt.Sprintf("; in the background: %v", failed)
	}
	return status, body, wrong
}

// agent does what i-agent's did: it bundles and fails to make an image.
func (r *replay) agent(p *place) {
	r.t.Helper()
	waiting, _, err := p.agent.Waiting(r.t.Context(), "i-agent")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, w := range waiting {
		end := tasks.Status{State: tasks.Complete, Progress: 100, Manifest: w.Bucket + "/" + w.Prefix + ".manifest.xml"}
		if w.Kind == tasks.CreateImage {
			end = tasks.Status{State: tasks.Failed, Code: "Client.NoSpace", Message: "the disk is full"}
		}
		mine, err := p.agent.Take(r.t.Context(), w, "agent")
		if err == nil {
			_, err = p.agent.Update(r.t.Context(), mine, end)
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
}

// spoilt is a request with another signature.
func spoilt(l *recorded) *recorded {
	s := *l
	flip := func(text string) string {
		last := byte('0')
		if text[len(text)-1] == '0' {
			last = '1'
		}
		return text[:len(text)-1] + string(last)
	}
	if auth := l.Headers["Authorization"]; auth != "" {
		s.Headers = maps.Clone(l.Headers)
		s.Headers["Authorization"] = flip(auth)
	} else {
		s.Path = flip(l.Path) // X-Amz-Signature is the last
	}
	return &s
}

// TestSDKReplay: requests of the AWS SDK for Go, with the signatures it made, are
// answered so that they mean to it what they meant when they were recorded.
// $INSTAR_RECORD names another record.
func TestSDKReplay(t *testing.T) {
	name := os.Getenv("INSTAR_RECORD")
	if name == "" {
		name = "testdata/sdk.jsonl"
	}
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var all []*recorded
	for line := range bytes.Lines(data) {
		l := &recorded{}
		if err := json.Unmarshal(line, l); err != nil {
			t.Fatalf("line %d: %v", len(all)+1, err)
		}
		if l.Method != "" { // the first says of which SDK it is
			all = append(all, l)
		}
	}
	if len(all) < 250 {
		t.Fatalf("%d requests are recorded", len(all))
	}
	r := newReplay(t, all[0].At)
	seen := map[string]int{}
	for i, l := range all {
		seen[l.Action]++
		r.mu.Lock()
		r.now, r.next = l.At, l.Made
		r.mu.Unlock()
		if l.Status == http.StatusOK {
			if status, body := r.send(spoilt(l)); status != http.StatusUnauthorized && status != http.StatusForbidden {
				t.Fatalf("request %d, %s, with a wrong signature: %d %s", i+1, l.Action, status, body)
			}
		}
		status, body, wrong := r.answered(l)
		if wrong != "" {
			want, _ := json.Marshal(l.Output)
			t.Errorf("request %d, %s: %s\n%s\nanswer %d: %s\nthe SDK had: %s %s", i+1, l.Action, wrong, l.Body, status, body, l.Code, want)
		}
	}
	for _, a := range r.regions["eu-home-1"].api.Actions() {
		if seen[a] == 0 {
			t.Errorf("no request of %s is recorded: test/catalogsdk must make one", a)
		}
	}
	t.Logf("%d requests of %d actions", len(all), len(seen))
}
