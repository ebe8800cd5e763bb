package metadata

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/test/selfsigned"
)

var update = flag.Bool("update", false, "write the golden files anew")

// crawl fetches everything below a path the way cloud-init does and returns
// path: body for every leaf, in order. Any answer but 200 fails the test.
func crawl(t *testing.T, h *Handler, from, path string) (out [][2]string) {
	t.Helper()
	list := ask(h, from, "GET", path)
	if list.Code != 200 {
		t.Fatalf("GET %s: %d", path, list.Code)
	}
	for _, name := range strings.Split(list.Body.String(), "\n") {
		child := path + name
		switch num, key, isKey := strings.Cut(name, "="); {
		case name == "":
			t.Fatalf("%s lists an empty name", path)
		case isKey && strings.Trim(num, "0123456789") == "" && key != "":
			child = path + num + "/openssh-key"
		case strings.HasSuffix(name, "/"):
			if bare := ask(h, from, "GET", strings.TrimSuffix(child, "/")); bare.Code != 200 || bare.Body.String() != ask(h, from, "GET", child).Body.String() {
				t.Errorf("GET %s without the slash: %d, or another listing", child, bare.Code)
			}
			out = append(out, crawl(t, h, from, child)...)
			continue
		}
		w := ask(h, from, "GET", child)
		if w.Code != 200 {
			t.Errorf("GET %s: %d although it is listed", child, w.Code)
		}
		if slash := ask(h, from, "GET", child+"/"); slash.Code != 200 {
			t.Errorf("GET %s/: %d", child, slash.Code)
		}
		if doubled := ask(h, from, "GET", strings.ReplaceAll(child, "/", "//")); doubled.Code != 200 {
			t.Errorf("GET %s with doubled slashes: %d", child, doubled.Code)
		}
		if strings.HasSuffix(w.Body.String(), "\n") {
			t.Errorf("GET %s ends in a newline", child)
		}
		out = append(out, [2]string{child, w.Body.String()})
	}
	return out
}

func testSigner(t testing.TB) (*Signer, *x509.Certificate) {
	t.Helper()
	key, cert := selfsigned.New(t)
	s, err := NewSigner(key, cert)
	if err != nil {
		t.Fatal(err)
	}
	return s, cert
}

// TestTree pins every path and value of a full record, at latest.
func TestTree(t *testing.T) {
	signer, _ := testSigner(t)
	h := newHandler(t, Options{Signer: signer}, full(t))
	var b strings.Builder
	for _, leaf := range append(crawl(t, h, fullAddr, "/latest/meta-data/"), crawl(t, h, fullAddr, "/latest/dynamic/")...) {
		path, body := leaf[0], leaf[1]
		switch filepath.Base(path) {
		case "pkcs7", "rsa2048", "signature":
			body = "(signature)"
		case "info", "web-role", "ec2-instance":
			var m map[string]string
			if err := json.Unmarshal([]byte(body), &m); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			for _, k := range []string{"LastUpdated", "Expiration"} {
				at, err := time.Parse("2006-01-02T15:04:05Z", m[k])
				if m[k] == "" {
					continue
				}
				if err != nil || time.Until(at) > 7*time.Hour {
					t.Errorf("%s: %s is %q", path, k, m[k])
				}
				body = strings.ReplaceAll(body, m[k], "(time)")
			}
		}
		fmt.Fprintf(&b, "%s\n\t%s\n", path, strings.ReplaceAll(body, "\n", "\n\t"))
	}
	golden := "testdata/full.tree"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Errorf("the tree changed (-want +got):\n%s", d)
	}
}

// TestVersions crawls every version of a full and of a small record, and
// checks that a category is there from its version on and not before.
func TestVersions(t *testing.T) {
	h := newHandler(t, Options{}, full(t), small("i-1", "192.0.2.99"))
	got := ask(h, fullAddr, "GET", "/").Body.String()
	if want := strings.Join(versions, "\n"); got != want {
		t.Errorf("GET / lists %q", got)
	}
	since := map[string]string{
		"ami-id": "1.0", "public-ipv4": "2007-01-19", "product-codes": "2007-03-01", "instance-type": "2007-08-29",
		"ramdisk-id": "2007-10-10", "block-device-mapping/ami": "2007-12-15", "placement/availability-zone": "2008-02-01",
		"instance-action": "2008-09-01", "mac": "2011-01-01", "network/interfaces/macs/02:00:00:00:00:0a/vpc-id": "2011-01-01",
		"iam/info": "2012-01-12", "services/domain": "2014-02-25", "spot/termination-time": "2014-11-05",
		"services/partition": "2015-10-20", "network/interfaces/macs/02:00:00:00:00:0a/ipv6s": "2016-06-30",
		"spot/instance-action": "2018-03-28", "identity-credentials/ec2/info": "2018-08-17", "events/maintenance/scheduled": "2018-08-17",
		"instance-life-cycle": "2019-10-01", "placement/region": "2020-10-27", "events/recommendations/rebalance": "2020-10-27",
		"network/interfaces/macs/02:00:00:00:00:0a/network-card": "2021-01-03", "ipv6": "2021-01-03", "tags/instance/Name": "2021-03-23",
		"autoscaling/target-lifecycle-state": "2021-07-15",
	}
	for _, version := range versions {
		var paths []string
		for _, leaf := range crawl(t, h, fullAddr, "/"+version+"/meta-data/") {
			paths = append(paths, strings.TrimPrefix(leaf[0], "/"+version+"/meta-data/"))
		}
		for path, first := range since {
			want := first <= version
			if slices.Contains(paths, path) != want {
				t.Errorf("version %s lists %s: %v, want %v", version, path, !want, want)
			}
			if code := ask(h, fullAddr, "GET", "/"+version+"/meta-data/"+path).Code; (code == 200) != want {
				t.Errorf("GET /%s/meta-data/%s: %d, there: %v", version, path, code, want)
			}
		}
		crawl(t, h, "192.0.2.99", "/"+version+"/meta-data/")
		top := ask(h, fullAddr, "GET", "/"+version+"/").Body.String()
		want := "dynamic\nmeta-data\nuser-data"
		if version < "2009-04-04" {
			want = "meta-data\nuser-data"
		}
		if top != want {
			t.Errorf("GET /%s/ lists %q, want %q", version, top, want)
		}
	}
	if got := ask(h, "192.0.2.99", "GET", "/latest").Body.String(); got != "dynamic\nmeta-data" {
		t.Errorf("GET /latest without user data lists %q", got)
	}
}

func TestPaths(t *testing.T) {
	h := newHandler(t, Options{}, full(t), small("i-1", "192.0.2.99"))
	for _, c := range []struct {
		from, path string
		code       int
		body       string
	}{
		{fullAddr, "/latest/meta-data/public-keys", 200, "0=alice\n1=bob"},
		{fullAddr, "/latest/meta-data/public-keys/", 200, "0=alice\n1=bob"},
		{fullAddr, "/latest/meta-data/public-keys/0", 200, "openssh-key"},
		{fullAddr, "/latest/meta-data/public-keys/1/", 200, "openssh-key"},
		{fullAddr, "/latest/meta-data/public-keys/2", 404, ""},
		{fullAddr, "/latest/meta-data/public-keys/00", 404, ""},
		{fullAddr, "/latest/meta-data/public-keys/-1", 404, ""},
		{fullAddr, "/latest/meta-data/public-keys/0=alice", 404, ""},
		{fullAddr, "//latest//meta-data///instance-id//", 200, "i-0abc1234def567890"},
		{fullAddr, "/latest/meta-data/instance-id/x", 404, ""},
		{fullAddr, "/latest/meta-data/instance-i", 404, ""},
		{fullAddr, "/latest/meta-data/../meta-data/instance-id", 404, ""},
		{fullAddr, "/latest/meta-data/./instance-id", 404, ""},
		{fullAddr, "/latest/meta-data/instance-id\x00", 404, ""},
		{fullAddr, "/latest/meta-data/\xc0\xaf", 404, ""},
		{fullAddr, "/latest/meta-data/instance-id?x=/../y", 200, "i-0abc1234def567890"},
		{fullAddr, "/latest/META-DATA/instance-id", 404, ""},
		{fullAddr, "/2009-04-05/meta-data/instance-id", 404, ""},
		{fullAddr, "/2009-04-04/meta-data/instance-id", 200, "i-0abc1234def567890"},
		{fullAddr, "latest/meta-data/instance-id", 200, "i-0abc1234def567890"},
		{fullAddr, "*", 404, ""},
		{fullAddr, "/latest/meta-data/placement", 200, "availability-zone\navailability-zone-id\ngroup-name\nhost-id\npartition-number\nregion"},
		{fullAddr, "/latest/meta-data/network/interfaces/macs/", 200, "02:00:00:00:00:0a/\n02:00:00:00:00:0b/"},
		{fullAddr, "/latest/dynamic/instance-identity", 200, "document"},
		{fullAddr, "/latest/dynamic/instance-identity/pkcs7", 404, ""},
		{fullAddr, "/latest/user-data", 200, "#!/bin/sh\necho hello\n"},
		{fullAddr, "/latest/user-data/", 200, "#!/bin/sh\necho hello\n"},
		{fullAddr, "/latest/api", 404, ""},
		{fullAddr, "/latest/api/instar/launch", 404, ""},
		{"192.0.2.99", "/latest/user-data", 404, ""},
		{"192.0.2.99", "/latest/meta-data/public-keys/", 404, ""},
		{"192.0.2.99", "/latest/meta-data/tags", 404, ""},
		{"192.0.2.99", "/latest/meta-data/iam/info", 404, ""},
		{"192.0.2.99", "/latest/meta-data/iam/", 404, ""},
		{"192.0.2.99", "/latest/meta-data/spot/instance-action", 404, ""},
		{"192.0.2.99", "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", 404, ""},
		{"192.0.2.99", "/latest/meta-data/events/maintenance/scheduled", 200, "[]"},
		{"192.0.2.99", "/latest/meta-data/hostname", 200, "ip-192-0-2-99"},
	} {
		w := ask(h, c.from, "GET", c.path)
		if w.Code != c.code || c.code == 200 && w.Body.String() != c.body {
			t.Errorf("GET %q: %d %q, want %d %q", c.path, w.Code, w.Body, c.code, c.body)
		}
		if c.code != 200 && (!strings.Contains(w.Body.String(), fmt.Sprintf("<title>%d - ", c.code)) || w.Header().Get("Content-Type") != "text/html") {
			t.Errorf("GET %q: the error page is %q", c.path, w.Body)
		}
		head := ask(h, c.from, "HEAD", c.path)
		if head.Code != c.code || head.Body.Len() != 0 || head.Header().Get("Content-Length") != fmt.Sprint(w.Body.Len()) {
			t.Errorf("HEAD %q: %d, %d bytes, Content-Length %s", c.path, head.Code, head.Body.Len(), head.Header().Get("Content-Length"))
		}
	}
}

// TestUserDataExact serves every byte value as it was given, under the type
// that keeps clients from reading it as text.
func TestUserDataExact(t *testing.T) {
	data := make([]byte, MaxUserData)
	for i := range data {
		data[i] = byte(i)
	}
	in := small("i-1", fullAddr)
	in.UserDataBase64 = base64.StdEncoding.EncodeToString(data)
	empty := small("i-2", "192.0.2.2")
	empty.UserData = Blob{}
	h := newHandler(t, Options{}, in, empty)
	w := ask(h, fullAddr, "GET", "/latest/user-data")
	if w.Body.String() != string(data) || w.Header().Get("Content-Type") != "application/octet-stream" || w.Header().Get("Content-Encoding") != "" {
		t.Errorf("user data came back as %d bytes of %s", w.Body.Len(), w.Header())
	}
	if w := ask(h, "192.0.2.2", "GET", "/latest/user-data"); w.Code != 200 || w.Body.Len() != 0 {
		t.Errorf("empty user data: %d, %d bytes", w.Code, w.Body.Len())
	}
}

// TestIdentitySignatures verifies all three signatures with openssl alone.
func TestIdentitySignatures(t *testing.T) {
	signer, cert := testSigner(t)
	h := newHandler(t, Options{Signer: signer}, full(t))
	dir := t.TempDir()
	get := func(name string) string {
		return ask(h, fullAddr, "GET", "/latest/dynamic/instance-identity/"+name).Body.String()
	}
	write := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	openssl := func(args ...string) []byte {
		t.Helper()
		out, err := exec.Command("openssl", args...).Output()
		if err != nil {
			t.Fatalf("openssl %v: %v", args, err)
		}
		return out
	}
	document := get("document")
	certFile := write("cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
	for _, name := range []string{"pkcs7", "rsa2048"} {
		p := write(name, "-----BEGIN PKCS7-----\n"+get(name)+"\n-----END PKCS7-----\n")
		content := openssl("smime", "-verify", "-inform", "PEM", "-in", p, "-certfile", certFile, "-noverify")
		if string(content) != document {
			t.Errorf("%s holds %q, the document is %q", name, content, document)
		}
	}
	raw, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(get("signature"), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	pub := write("pub.pem", string(openssl("x509", "-in", certFile, "-noout", "-pubkey")))
	openssl("dgst", "-sha256", "-verify", pub, "-signature", write("sig", string(raw)), write("doc", document))
	var doc map[string]any
	if err := json.Unmarshal([]byte(document), &doc); err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]any{"instanceId": "i-0abc1234def567890", "region": "eu-test-1", "availabilityZone": "eu-test-1a", "privateIp": fullAddr, "billingProducts": nil, "pendingTime": "2026-01-02T03:04:05Z", "version": "2017-09-30"} {
		if got, ok := doc[k]; !ok || got != want {
			t.Errorf("document has %s: %v, want %v", k, got, want)
		}
	}
}
