package ec2api_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
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

func TestImages(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "first image", "Description", "d & <e>", "TagSpecification.1.ResourceType", "image", "TagSpecification.1.Tag.1.Key", "k",
		"TagSpecification.1.Tag.1.Value", "v", "BlockDeviceMapping.1.DeviceName", "/dev/sdb", "BlockDeviceMapping.1.VirtualName", "ephemeral0",
		"BlockDeviceMapping.4.DeviceName", "/dev/sdc", "BlockDeviceMapping.4.NoDevice", "")
	r := w.want("", alice, "DescribeImages", "ImageId.1", id)
	for name, want := range map[string]string{
		"imageId": id, "name": "first image", "description": "d & <e>", "imageState": "available", "imageOwnerId": alice, "key": "k", "value": "v",
		"virtualName": "ephemeral0", "architecture": "x86_64", "creationDate": "2026-11-22T12:00:00.000Z",
	} {
		if got := r.first(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if !strings.Contains(r.Body, "<noDevice></noDevice>") || !strings.Contains(r.Body, `xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"`) || r.first("requestId") == "" {
		t.Errorf("the answer is\n%s", r.Body)
	}
	w.want("InvalidAMIName.Duplicate", alice, "RegisterImage", "Name", "first image", "RootDeviceName", "/dev/sda1")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	w.want("", alice, "ModifyImageAttribute", "ImageId", id, "LaunchPermission.Add.1.UserId", bob, "UserId.1", carol)
	if r := w.want("", bob, "DescribeImages", "ImageId.1", id); r.first("imageId") != id || r.first("key") != "" {
		t.Errorf("bob sees\n%s", r.Body)
	}
	for _, f := range [][2]string{{"tag:k", "v"}, {"tag-key", "k"}, {"tag-value", "*"}} {
		for who, want := range map[string]string{alice: id, bob: ""} {
			if r := w.want("", who, "DescribeImages", "Filter.1.Name", f[0], "Filter.1.Value.1", f[1]); r.first("imageId") != want {
				t.Errorf("by %q %s finds %q, want %q", f, who, r.first("imageId"), want)
			}
		}
	}
	w.want("AuthFailure", bob, "DescribeImageAttribute", "ImageId", id, "Attribute", "description")
	w.want("InvalidAMIID.NotFound", carol, "DescribeImageAttribute", "ImageId", id, "Attribute", "description")
	if r := w.want("", alice, "DescribeImageAttribute", "ImageId", id, "Attribute", "launchPermission"); r.first("userId") != bob || len(r.all("userId")) != 1 {
		t.Errorf("launch permissions are\n%s", r.Body)
	}
	w.want("", alice, "ModifyImageAttribute", "ImageId", id, "Attribute", "launchPermission", "OperationType", "add", "UserGroup.1", "all")
	w.want("", alice, "ResetImageAttribute", "ImageId", id, "Attribute", "launchPermission")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	w.want("DryRunOperation", alice, "DeregisterImage", "ImageId", id, "DryRun", "true")
	w.want("UnauthorizedOperation", "KEYREADER", "DeregisterImage", "ImageId", id)
	w.want("DryRunOperation", "KEYREADER", "DescribeImages", "DryRun", "true")
	w.want("", alice, "DeregisterImage", "ImageId", id)
	w.want("InvalidAMIID.Unavailable", alice, "DescribeImages", "ImageId.1", id)
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
}

func TestRequestsThatAreWrong(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "an image")
	for _, c := range []struct {
		code   string
		action string
		pairs  []string
	}{
		{"InvalidAction", "RebootTheMoon", nil},
		{"InvalidAction", "RunInstances", nil},
		{"UnknownParameter", "DescribeImages", []string{"Colour", "red"}},
		{"UnknownParameter", "DescribeImages", []string{"ImageId.0", id}},
		{"UnknownParameter", "DescribeImages", []string{"ImageId.x", id}},
		{"InvalidParameterValue", "DescribeImages", []string{"DryRun", "perhaps"}},
		{"InvalidParameterValue", "DescribeImages", []string{"MaxResults", "0"}},
		{"InvalidParameterValue", "DescribeImages", []string{"MaxResults", "many"}},
		{"InvalidParameterValue", "DescribeImages", []string{"Filter.1.Name", "colour", "Filter.1.Value.1", "red"}},
		{"InvalidPaginationToken", "DescribeImages", []string{"NextToken", "AAAA"}},
		{"MissingParameter", "DeregisterImage", nil},
		{"MissingParameter", "ModifyImageAttribute", []string{"ImageId", id}},
		{"InvalidParameterCombination", "ModifyImageAttribute", []string{"ImageId", id, "Description.Value", "x", "LaunchPermission.Add.1.Group", "all"}},
		{"InvalidParameterValue", "ModifyImageAttribute", []string{"ImageId", id, "Attribute", "kernel", "Value", "x"}},
		{"InvalidAMIAttributeItemValue", "ModifyImageAttribute", []string{"ImageId", id, "LaunchPermission.Add.1.Group", "friends"}},
		{"InvalidAMIAttributeItemValue", "ModifyImageAttribute", []string{"ImageId", id, "LaunchPermission.Add.1.Group", "all", "LaunchPermission.Add.1.UserId", bob}},
		{"InvalidAMIID.Malformed", "DescribeImages", []string{"ImageId.1", "ami-x"}},
		{"InvalidAMIName.Malformed", "RegisterImage", []string{"Name", "a\tb", "RootDeviceName", "/dev/sda1"}},
		{"InvalidBlockDeviceMapping", "RegisterImage", []string{"Name", "abc", "RootDeviceName", "/dev/sda1", "BlockDeviceMapping.1.DeviceName", "/dev/sdb"}},
		{"InvalidParameterValue", "ImportKeyPair", []string{"KeyName", "k", "PublicKeyMaterial", "%%%"}},
		{"InvalidParameterValue", "EnableImageDeprecation", []string{"ImageId", id, "DeprecateAt", "soon"}},
		{"NoSuchVersion", "DescribeImages", []string{"Version", "latest"}},
		{"AuthFailure", "RegisterImage", []string{"Name", "abc", "ImageLocation", "bob-1/x.manifest.xml"}},
		{"AuthFailure", "RegisterImage", []string{"Name", "abc", "ImageLocation", "web-1@parent"}},
		{"InvalidBundleId.NotFound", "DescribeBundleTasks", []string{"BundleId.1", "bun-00000000000000000"}},
		{"InvalidInstanceID.NotFound", "CreateImage", []string{"InstanceId", "i-b1", "Name", "abc"}},
		{"InvalidInstanceID.Malformed", "CreateImage", []string{"InstanceId", "../x", "Name", "abc"}},
	} {
		w.want(c.code, alice, c.action, c.pairs...)
	}
	for name, want := range map[string]string{
		"Action=DescribeImages&Action=DeregisterImage&Version=2016-11-15": "MalformedQueryString",
		"Version=2016-11-15":                       "MissingParameter",
		"Action=DescribeImages&Name=%zz":           "MalformedQueryString",
		"Action=DescribeImages&Owner.1=%ff":        "MalformedQueryString",
		"Action=DescribeImages&" + many(6000):      "MalformedQueryString",
		"Action=GetCallerIdentity":                 "InvalidAction", // of another service
		"Action=DescribeImages&Version=2010-08-31": "",
		"Action=DescribeImages&&":                  "",
	} {
		if r := w.do(w.sign("KEYALICE", "ec2", name)); r.Code != want {
			t.Errorf("%.60s: %s, want %q\n%.300s", name, r.Code, want, r.Body)
		}
	}
	if r := w.do(w.sign("KEYNOBODY", "ec2", "Action=DescribeImages")); r.Code != "AuthFailure" || r.Status != 401 || r.first("RequestID") == "" {
		t.Errorf("an unknown key: %+v", r)
	}
	unsigned := httptest.NewRequest("POST", "/", strings.NewReader("Action=DescribeImages"))
	if r := w.do(unsigned); r.Code != "MissingAuthenticationToken" || r.Status != 403 {
		t.Errorf("unsigned: %+v", r)
	}
	big := httptest.NewRequest("POST", "/", strings.NewReader(strings.Repeat("a", 256<<10+1)))
	if r := w.do(big); r.Code != "RequestEntityTooLarge" {
		t.Errorf("a large body: %.300v", r)
	}
	if r := w.want("", alice, "GetCallerIdentity"); r.first("Account") != alice || r.first("RequestId") == "" {
		t.Errorf("who I am: %s", r.Body)
	}
}

// TestPresigned: a presigned request reads as long as it says, and changes
// something only as long as others do.
func TestPresigned(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "an image")
	signed := w.now
	ask := func(action string) reply {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), "GET", "http://127.0.0.1:8773/?X-Amz-Expires=3600&Version=2016-11-15&Action="+action, nil)
		sum := sha256.Sum256(nil)
		url, _, err := v4.NewSigner().PresignHTTP(t.Context(), aws.Credentials{AccessKeyID: "KEYALICE", SecretAccessKey: secret}, r, hex.EncodeToString(sum[:]), "ec2", region, signed)
		if err != nil {
			t.Fatal(err)
		}
		return w.do(httptest.NewRequestWithContext(t.Context(), "GET", url, nil))
	}
	for _, c := range []struct {
		pass          time.Duration
		reads, change string
	}{{0, "", "DryRunOperation"}, {5 * time.Minute, "", "DryRunOperation"}, {time.Second, "", "RequestExpired"}, {time.Hour, "RequestExpired", "RequestExpired"}} {
		w.now = w.now.Add(c.pass)
		if r := ask("DescribeImages"); r.Code != c.reads {
			t.Errorf("read after %s: %q, want %q\n%s", w.now.Sub(signed), r.Code, c.reads, r.Body)
		}
		if r := ask("DeregisterImage&DryRun=true&ImageId=" + id); r.Code != c.change {
			t.Errorf("change after %s: %q, want %q\n%s", w.now.Sub(signed), r.Code, c.change, r.Body)
		}
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "&Owner.%d=self", i+1)
	}
	return b.String()
}

func TestPages(t *testing.T) {
	w := newWorld(t)
	var ids []string
	for i := range 7 {
		ids = append(ids, w.register(alice, fmt.Sprintf("image %d", i)))
	}
	seen := map[string]bool{}
	token, pages := "", 0
	for {
		pairs := []string{"Owner.1", "self", "MaxResults", "3"}
		if token != "" {
			pairs = append(pairs, "NextToken", token)
			// It is good for this caller, action and question alone.
			w.want("InvalidPaginationToken", bob, "DescribeImages", pairs...)
			w.want("InvalidPaginationToken", alice, "DescribeImages", "NextToken", token)
			w.want("InvalidPaginationToken", alice, "DescribeTags", "NextToken", token)
			for i := range token {
				bad := []byte(token)
				if bad[i]++; bad[i] == '{' || bad[i] == '[' || bad[i] == ':' {
					bad[i] = 'A'
				}
				w.want("InvalidPaginationToken", alice, "DescribeImages", "Owner.1", "self", "MaxResults", "3", "NextToken", string(bad))
			}
		}
		r := w.want("", alice, "DescribeImages", pairs...)
		for _, id := range r.all("imageId") {
			if seen[id] {
				t.Errorf("%s is on two pages", id)
			}
			seen[id] = true
		}
		pages++
		if token = r.first("nextToken"); token == "" {
			break
		}
	}
	if len(seen) != len(ids) || pages != 3 {
		t.Errorf("%d images on %d pages, want %d on 3", len(seen), pages, len(ids))
	}
}

func TestBundleTasks(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	to := []string{"InstanceId", "i-a1", "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web"}
	w.want("DryRunOperation", alice, "BundleInstance", append(to, "DryRun", "true")...)
	w.want("InvalidInstanceID.NotFound", bob, "BundleInstance", to...)
	w.want("AuthFailure", alice, "BundleInstance", "InstanceId", "i-a1", "Storage.S3.Bucket", "bob-1", "Storage.S3.Prefix", "web")
	r := w.want("", alice, "BundleInstance", to...)
	id := r.first("bundleId")
	if r.first("state") != "pending" || r.first("bucket") != "alice-1" || r.first("instanceId") != "i-a1" {
		t.Errorf("the task is\n%s", r.Body)
	}
	w.want("BundlingInProgress", alice, "BundleInstance", to...)
	w.want("InvalidBundleId.NotFound", bob, "DescribeBundleTasks", "BundleId.1", id)
	if r := w.want("", bob, "DescribeBundleTasks"); r.first("bundleId") != "" {
		t.Errorf("bob sees\n%s", r.Body)
	}
	waiting, _, err := w.tasks.Waiting(ctx, "i-a1")
	if err != nil || len(waiting) != 1 {
		t.Fatalf("waiting: %v, %v", waiting, err)
	}
	mine, err := w.tasks.Take(ctx, waiting[0], "agent")
	if err != nil {
		t.Fatal(err)
	}
	if mine, err = w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Storing, Progress: 42}); err != nil {
		t.Fatal(err)
	}
	if r := w.want("", alice, "DescribeBundleTasks", "Filter.1.Name", "state", "Filter.1.Value.1", "stor*"); r.first("progress") != "42%" {
		t.Errorf("while it is stored:\n%s", r.Body)
	}
	if r := w.want("", alice, "CancelBundleTask", "BundleId", id); r.first("state") != "cancelling" {
		t.Errorf("cancelled:\n%s", r.Body)
	}
	if _, err := w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Cancelled}); err != nil {
		t.Fatal(err)
	}
	if r := w.want("", alice, "DescribeBundleTasks", "BundleId.1", id); r.first("state") != "failed" || r.first("code") != "Client.Cancelled" {
		t.Errorf("at the end:\n%s", r.Body)
	}
	w.want("IncorrectState", alice, "CancelBundleTask", "BundleId", id)
}

// TestTooManyTasks: an instance is not asked without end, and what others have it
// do is not told.
func TestTooManyTasks(t *testing.T) {
	w := newWorld(t)
	for i := range 15 {
		w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", fmt.Sprintf("image %d", i))
	}
	others, err := w.tasks.Submit(t.Context(), tasks.Request{Kind: tasks.BundleInstance, Instance: "i-a1", Account: bob, Bucket: "bob-1", Prefix: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if r := w.want("BundlingInProgress", alice, "BundleInstance", "InstanceId", "i-a1", "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web"); strings.Contains(r.Body, others.ID) {
		t.Errorf("another's task is named:\n%s", r.Body)
	}
	w.want("RequestLimitExceeded", alice, "CreateImage", "InstanceId", "i-a1", "Name", "image 16")
	w.want("", alice, "CreateImage", "InstanceId", "i-a2", "Name", "image 16")
	w.now = w.now.Add(tasks.Lifetime) // nobody does them any more
	w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "image 17")
	w.want("FilterLimitExceeded", alice, "DescribeTags", "Filter.1.Name", "key", "Filter.1.Value.1", strings.Repeat("a", 8193))
}

func TestCreateImage(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	id := w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "of a machine", "NoReboot", "true").first("imageId")
	state := func() (string, string) {
		t.Helper()
		r := w.want("", alice, "DescribeImages", "ImageId.1", id)
		return r.first("imageState"), r.first("code")
	}
	if s, _ := state(); s != "pending" {
		t.Errorf("at first it is %s", s)
	}
	w.want("InvalidAMIName.Duplicate", alice, "CreateImage", "InstanceId", "i-a2", "Name", "of a machine")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	waiting, _, err := w.tasks.Waiting(ctx, "i-a1")
	if err != nil || len(waiting) != 1 || waiting[0].ImageID != id || waiting[0].Name != "i-a1" || !waiting[0].NoReboot {
		t.Fatalf("waiting: %+v, %v", waiting, err)
	}
	mine, err := w.tasks.Take(ctx, waiting[0], "agent")
	if err != nil {
		t.Fatal(err)
	}
	// What the agent names must be what it was asked for.
	if _, err := w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Complete, Manifest: "i-b1@" + strings.Repeat("0", 64)}); err != nil {
		t.Fatal(err)
	}
	if s, why := state(); s != "failed" || why != "Server.InternalError" {
		t.Errorf("an image of another instance: %s, %s", s, why)
	}
	id = w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "of a machine that is off").first("imageId")
	w.now = w.now.Add(tasks.Lifetime)
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if s, why := state(); s != "failed" || why != "Client.InstanceUnreachable" {
		t.Errorf("nobody took it: %s, %s", s, why)
	}
}

// TestSettleGoesOn: an image that cannot be completed, and a status that is none,
// keep no other image from its end, and old tasks are forgotten all the same.
func TestSettleGoesOn(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	ids := map[string]string{}
	for _, i := range []string{"i-a1", "i-a2", "i-a3"} {
		ids[i] = w.want("", alice, "CreateImage", "InstanceId", i, "Name", "of "+i).first("imageId")
	}
	end := func(instance string, s tasks.Status) {
		t.Helper()
		waiting, _, err := w.tasks.Waiting(ctx, instance)
		if err != nil || len(waiting) != 1 {
			t.Fatalf("waiting: %v, %v", waiting, err)
		}
		mine, err := w.tasks.Take(ctx, waiting[0], "agent")
		if err == nil {
			_, err = w.tasks.Update(ctx, mine, s)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l, err := w.tasks.List(ctx, "i-a1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(ctx, w.store, tasks.Prefix+"i-a1/"+l[0].ID+"/status", []byte("{"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	// What the agent names is not in the store.
	end("i-a2", tasks.Status{State: tasks.Complete, Manifest: "i-a2@" + strings.Repeat("0", 64)})
	end("i-a3", tasks.Status{State: tasks.Failed, Code: "no code", Message: "no room"})
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	state := func(i string) string {
		t.Helper()
		r := w.want("", alice, "DescribeImages", "ImageId.1", ids[i])
		return r.first("imageState") + " " + r.first("code")
	}
	for i, want := range map[string]string{"i-a1": "pending ", "i-a2": "failed Client.InvalidManifest", "i-a3": "failed Server.InternalError"} {
		if got := state(i); got != want {
			t.Errorf("the image of %s is %s, want %s", i, got, want)
		}
	}
	w.now = w.now.Add(tasks.Lifetime + tasks.Keep)
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if got := state("i-a1"); got != "failed Server.InternalError" {
		t.Errorf("the image whose task nobody can read is %s", got)
	}
	if l, err := w.tasks.List(ctx, ""); err != nil || len(l) != 0 {
		t.Errorf("%d tasks are left, %v", len(l), err)
	}
	if _, err := w.store.Stat(ctx, tasks.Prefix+"i-a1/"+l[0].ID+"/request"); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("the task nobody can read is still there: %v", err)
	}
}

func TestKeyPairsAndPlaces(t *testing.T) {
	w := newWorld(t)
	r := w.want("", alice, "CreateKeyPair", "KeyName", "k1", "KeyType", "ed25519", "TagSpecification.1.ResourceType", "key-pair", "TagSpecification.1.Tag.1.Key", "a")
	id := r.first("keyPairId")
	if !strings.Contains(r.first("keyMaterial"), "PRIVATE KEY") || id == "" {
		t.Errorf("created:\n%s", r.Body)
	}
	w.want("InvalidKeyPair.Duplicate", alice, "CreateKeyPair", "KeyName", "k1")
	w.want("InvalidKeyPair.NotFound", bob, "DescribeKeyPairs", "KeyName.1", "k1")
	w.want("InvalidKey.Format", alice, "ImportKeyPair", "KeyName", "k2", "PublicKeyMaterial", "bm8ga2V5")
	w.want("", alice, "CreateTags", "ResourceId.1", id, "Tag.1.Key", "b", "Tag.1.Value", "c")
	if r := w.want("", alice, "DescribeTags", "Filter.1.Name", "resource-type", "Filter.1.Value.1", "key-*"); len(r.all("key")) != 2 {
		t.Errorf("tags:\n%s", r.Body)
	}
	if r := w.want("", bob, "DescribeTags"); len(r.all("key")) != 0 {
		t.Errorf("bob sees tags:\n%s", r.Body)
	}
	if r := w.want("", alice, "DescribeKeyPairs", "Filter.1.Name", "tag:b", "Filter.1.Value.1", "?", "IncludePublicKey", "true"); !strings.HasPrefix(r.first("publicKey"), "ssh-ed25519 ") {
		t.Errorf("key pairs:\n%s", r.Body)
	}
	w.want("", alice, "DeleteKeyPair", "KeyName", "k1")
	w.want("", alice, "DeleteKeyPair", "KeyName", "k1")
	if r := w.want("", alice, "DescribeRegions"); r.first("regionName") != region || r.first("regionEndpoint") != "127.0.0.1:8773" {
		t.Errorf("regions:\n%s", r.Body)
	}
	w.want("InvalidParameterValue", alice, "DescribeRegions", "RegionName.1", "moon-1")
	if r := w.want("", alice, "DescribeAvailabilityZones"); r.first("zoneName") != region+"a" {
		t.Errorf("zones:\n%s", r.Body)
	}
}
