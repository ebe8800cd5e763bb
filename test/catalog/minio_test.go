package catalog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
)

// A policy that names an account says nothing else: MinIO wants a statement.
const (
	emptyPolicy  = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetBucketLocation"],"Resource":["arn:aws:s3:::*"]}]}`
	exportPolicy = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["admin:ExportIAM"]}]}`
)

// users is a MinIO, over TLS, with users of every kind, and a catalog in a
// directory whose server asks it for them.
type users struct {
	*instar.Instar
	minio *servers.Server
	folder
}

func secretOfUser(name string) string { return "the-secret-of-" + name }

func newUsers(t *testing.T) *users {
	t.Helper()
	u := &users{minio: servers.MinIOTLS(t), folder: folder{t.TempDir()}}
	u.Instar = instar.New(t)
	m := u.minio
	for name, doc := range map[string]string{
		"instar-account-" + alice: emptyPolicy, "instar-account-" + alice + "-read-only": emptyPolicy, "instar-account-" + bob: emptyPolicy, "exports": exportPolicy,
	} {
		m.AddPolicy(t, name, doc)
	}
	for _, name := range []string{"instar-catalog", "anna", "anders", "reader", "nobody", "both", "off", "jane@example.com", "other-group"} {
		m.AddUser(t, name, secretOfUser(name))
	}
	for name, policies := range map[string]string{
		"instar-catalog": "exports", "anna": "readwrite,instar-account-" + alice, "reader": "instar-account-" + alice + "-read-only", "nobody": "readwrite",
		"both": "instar-account-" + alice + ",instar-account-" + bob, "off": "instar-account-" + alice, "jane@example.com": "instar-account-" + bob,
	} {
		m.Attach(t, policies, name, false)
	}
	m.AddToGroup(t, "team", "anders")
	m.Attach(t, "instar-account-"+bob, "team", true)
	m.AddToGroup(t, "closed", "other-group")
	m.Attach(t, "instar-account-"+bob, "closed", true)
	m.SetGroup(t, "closed", false)
	m.AddServiceAccount(t, "anna", "SVCANNA", secretOfUser("SVCANNA"), "", time.Time{})
	m.AddServiceAccount(t, "anders", "SVCTEAM", secretOfUser("SVCTEAM"), "", time.Now().Add(24*time.Hour))
	m.AddServiceAccount(t, "anna", "SVCNARROW", secretOfUser("SVCNARROW"), emptyPolicy, time.Time{})
	m.AddServiceAccount(t, "off", "SVCOFF", secretOfUser("SVCOFF"), "", time.Time{})
	m.SetUser(t, "off", false)
	m.AddServiceAccount(t, m.AccessKey, "SVCROOT", secretOfUser("SVCROOT"), "", time.Time{})

	loopfs.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", u.path("key"))
	pub, err := os.ReadFile(u.path("key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	u.write(t, "signers", `* namespaces="instar-catalog" `+string(pub))
	u.write(t, "secret", secretOfUser("instar-catalog")+"\n")
	if err := os.Mkdir(u.path("store"), 0o755); err != nil {
		t.Fatal(err)
	}
	u.accounts(t, "url: "+m.Endpoint+", ca-cert: "+m.CACert+", access-key-id: instar-catalog, secret-file: secret, every: 1s, keep: 20s")
	u.Want(t, instar.OK, "catalog", "create", "--store", u.path("store"), "--sign", u.path("key"), "--signers", u.path("signers"), region)
	return u
}

func (u *users) accounts(t *testing.T, minio string) {
	t.Helper()
	u.write(t, "accounts.yaml", "accounts: [{id: '"+alice+"', keys: [{access-key-id: LOCAL, secret-access-key: "+secretOfUser("LOCAL")+"}]}]\nminio: {"+minio+"}\n")
}

func (u *users) serve(t *testing.T) *process {
	t.Helper()
	return serveCatalog(t, u.Instar, "catalog", "serve", "--store", u.path("store"), "--sign", u.path("key"), "--signers", u.path("signers"),
		"--accounts", u.path("accounts.yaml"), "--listen", "127.0.0.1:0", "--access-log", "-")
}

// post sends a signed form and gives the status and the answer.
func post(t *testing.T, to, service, region string, c aws.Credentials, form url.Values) (int, string) {
	t.Helper()
	return postBy(t, http.DefaultClient, to, service, region, c, form)
}

func postBy(t *testing.T, client *http.Client, to, service, region string, c aws.Credentials, form url.Values) (int, string) {
	t.Helper()
	body := form.Encode()
	r, err := http.NewRequestWithContext(t.Context(), "POST", to, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	sum := sha256.Sum256([]byte(body))
	if err := v4.NewSigner().SignHTTP(t.Context(), c, r, hex.EncodeToString(sum[:]), service, region, time.Now()); err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// whoami is the account that a key stands for, as the server says; "" if it is
// refused.
func (p *process) whoami(t *testing.T, c aws.Credentials) string {
	t.Helper()
	status, doc := post(t, p.url, "sts", region, c, url.Values{"Action": {"GetCallerIdentity"}, "Version": {"2011-06-15"}})
	if status == http.StatusOK {
		return element(doc, "Account")
	}
	if code := element(doc, "Code"); code != "InvalidClientTokenId" && code != "SignatureDoesNotMatch" && code != "AuthFailure" {
		t.Errorf("%s: %d %s", c.AccessKeyID, status, doc)
	}
	return ""
}

func credentials(user string) aws.Credentials {
	return aws.Credentials{AccessKeyID: user, SecretAccessKey: secretOfUser(user)}
}

// becomes waits until a key stands for an account.
func (p *process) becomes(t *testing.T, c aws.Credentials, account string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		got := p.whoami(t, c)
		if got == account {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s stands for %q, want %q\n%s", c.AccessKeyID, got, account, p.log.String())
		}
	}
}

// TestMinIOUsers: the users, groups and service accounts of a real MinIO are
// accounts' by their policies, as MinIO lets them be, now and when they change;
// no secret shows anywhere.
func TestMinIOUsers(t *testing.T) {
	t.Parallel() // it waits most of the time
	u := newUsers(t)
	m := u.minio
	p := u.serve(t)
	for user, account := range map[string]string{
		"LOCAL": alice, "anna": alice, "reader": alice, "anders": bob, "jane@example.com": bob, "SVCANNA": alice, "SVCTEAM": bob,
		"nobody": "", "both": "", "off": "", "other-group": "", "instar-catalog": "", "SVCNARROW": "", "SVCOFF": "", "SVCROOT": "", "unheard-of": "",
	} {
		if got := p.whoami(t, credentials(user)); got != account {
			t.Errorf("%s stands for %q, want %q", user, got, account)
		}
		wrong := credentials(user)
		wrong.SecretAccessKey += "x"
		if got := p.whoami(t, wrong); got != "" {
			t.Errorf("%s with a wrong secret stands for %q", user, got)
		}
	}
	register := url.Values{"Action": {"RegisterImage"}, "Name": {"of-anna"}, "RootDeviceName": {"/dev/sda"}}
	if status, doc := post(t, p.url, "ec2", region, credentials("reader"), register); status != http.StatusForbidden || element(doc, "Code") != "UnauthorizedOperation" {
		t.Errorf("who may only read registers: %d %s", status, doc)
	}
	if status, doc := post(t, p.url, "ec2", region, credentials("SVCANNA"), register); status != http.StatusOK {
		t.Errorf("a service account registers: %d %s", status, doc)
	}

	// Temporary credentials are no secret that MinIO exports.
	if got := p.whoami(t, assume(t, m, credentials("anna"))); got != "" {
		t.Errorf("temporary credentials stand for %q", got)
	}

	// What changes there changes here.
	m.SetUser(t, "anna", false)
	p.becomes(t, credentials("anna"), "")
	p.becomes(t, credentials("SVCANNA"), "")
	m.SetUser(t, "off", true)
	p.becomes(t, credentials("off"), alice)
	m.SetGroup(t, "team", false)
	p.becomes(t, credentials("anders"), "")
	m.SetGroup(t, "team", true)
	p.becomes(t, credentials("anders"), bob)
	m.AddUser(t, "off", "another-secret-of-off")
	p.becomes(t, aws.Credentials{AccessKeyID: "off", SecretAccessKey: "another-secret-of-off"}, alice)
	p.becomes(t, credentials("off"), "")
	m.Attach(t, "instar-account-"+alice, "jane@example.com", false)
	p.becomes(t, credentials("jane@example.com"), alice)
	m.RemoveUser(t, "reader")
	p.becomes(t, credentials("reader"), "")

	// Who may export is asked anew; without the right its last answer ends.
	m.Attach(t, "readwrite", "instar-catalog", false)
	p.becomes(t, credentials("anders"), "")
	p.becomes(t, aws.Credentials{AccessKeyID: "off", SecretAccessKey: "another-secret-of-off"}, "")
	p.becomes(t, credentials("LOCAL"), alice)
	m.Attach(t, "exports", "instar-catalog", false)
	p.becomes(t, credentials("anders"), bob)

	log := p.log.String()
	for _, want := range []string{`"key":"both"`, `"key":"SVCNARROW"`, "admin:ExportIAM"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not say %s", want)
		}
	}
	argv, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string]string{"log": log, "argv": string(argv), "environment": string(environ)} {
		if strings.Contains(text, "secret-of-") || strings.Contains(text, m.SecretKey) {
			t.Errorf("the server's %s shows a secret:\n%s", where, text)
		}
	}
}

// TestMinIOExport: an export that an administrator made of the same users gives
// the same accounts; and the command that lists them shows no secret.
func TestMinIOExport(t *testing.T) {
	t.Parallel()
	u := newUsers(t)
	live := u.Want(t, instar.OK, "catalog", "accounts", "--accounts", u.path("accounts.yaml"))
	for _, want := range []string{alice + "  anna  user of MinIO's", alice + "  SVCANNA  service account of MinIO's anna", alice + "  reader  read-only", "not taken: both: ", "not taken: SVCNARROW: "} {
		if !strings.Contains(live.Stdout, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	export := u.minio.ExportIAM(t)
	if name := os.Getenv("INSTAR_WRITE_EXPORT"); name != "" {
		if err := os.WriteFile(name, export, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u.write(t, "export.zip", string(export))
	u.accounts(t, "export: export.zip")
	still := u.Want(t, instar.OK, "catalog", "accounts", "--accounts", u.path("accounts.yaml"))
	if live.Stdout != still.Stdout {
		t.Errorf("asked:\n%s\nexported:\n%s", live.Stdout, still.Stdout)
	}
	if err := os.Chmod(u.path("export.zip"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := u.Want(t, instar.File, "catalog", "accounts", "--accounts", u.path("accounts.yaml"))
	if !strings.Contains(r.Stderr, "chmod o=") {
		t.Errorf("an export that everybody may read: %s", r.Stderr)
	}
	// An access key that may not export, and one that is wrong.
	for _, x := range []struct{ user, secret, want string }{
		{"nobody", secretOfUser("nobody"), "admin:ExportIAM"},
		{"instar-catalog", "a-wrong-secret-of-it", "SignatureDoesNotMatch"},
	} {
		u.write(t, "secret", x.secret)
		u.accounts(t, "url: "+u.minio.Endpoint+", ca-cert: "+u.minio.CACert+", access-key-id: "+x.user+", secret-file: secret")
		r := u.Want(t, instar.S3, "catalog", "accounts", "--accounts", u.path("accounts.yaml"))
		if !strings.Contains(r.Stderr, x.want) || strings.Contains(r.Stderr, "secret-of") {
			t.Errorf("%s: %s", x.user, r.Stderr)
		}
	}
	for _, r := range []instar.Result{live, still, r} {
		if strings.Contains(r.Stdout+r.Stderr, "secret-of-") {
			t.Errorf("a secret is shown: %s", r)
		}
	}
}

// assume has MinIO make temporary credentials of a user's.
func assume(t *testing.T, s *servers.Server, c aws.Credentials) aws.Credentials {
	t.Helper()
	status, doc := postBy(t, s.Client(t), s.Endpoint, "sts", s.Region, c, url.Values{"Action": {"AssumeRole"}, "Version": {"2011-06-15"}, "DurationSeconds": {"3600"}})
	var a struct {
		Credentials struct{ AccessKeyId, SecretAccessKey, SessionToken string } `xml:"AssumeRoleResult>Credentials"`
	}
	if err := xml.NewDecoder(bytes.NewReader([]byte(doc))).Decode(&a); status != http.StatusOK || err != nil || a.Credentials.AccessKeyId == "" {
		t.Fatalf("AssumeRole: %d %v %s", status, err, doc)
	}
	return aws.Credentials{AccessKeyID: a.Credentials.AccessKeyId, SecretAccessKey: a.Credentials.SecretAccessKey, SessionToken: a.Credentials.SessionToken}
}
