package servers

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"net/url"
	"strconv"
	"testing"
	"time"
)

// What an administrator of MinIO does with mc admin, by the same requests
// (madmin-go).

const admin = "/minio/admin/v3/"

// AddPolicy makes a policy (mc admin policy create).
func (s *Server) AddPolicy(t testing.TB, name, document string) {
	t.Helper()
	s.curl(t, []byte(document), "-X", "PUT", "--data-binary", "@-", s.Endpoint+admin+"add-canned-policy?name="+url.QueryEscape(name))
}

// AddUser makes a user (mc admin user add).
func (s *Server) AddUser(t testing.TB, user, secret string) {
	t.Helper()
	s.curl(t, s.encrypt(t, map[string]any{"secretKey": secret, "status": "enabled"}), "-X", "PUT", "--data-binary", "@-",
		s.Endpoint+admin+"add-user?accessKey="+url.QueryEscape(user))
}

// RemoveUser removes a user (mc admin user remove).
func (s *Server) RemoveUser(t testing.TB, user string) {
	t.Helper()
	s.curl(t, nil, "-X", "DELETE", s.Endpoint+admin+"remove-user?accessKey="+url.QueryEscape(user))
}

// SetUser enables or disables a user (mc admin user enable, disable).
func (s *Server) SetUser(t testing.TB, user string, on bool) {
	t.Helper()
	s.curl(t, nil, "-X", "PUT", s.Endpoint+admin+"set-user-status?accessKey="+url.QueryEscape(user)+"&status="+status(on))
}

// AddToGroup puts users into a group, which is made if it is not there (mc admin
// group add).
func (s *Server) AddToGroup(t testing.TB, group string, users ...string) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"group": group, "members": users, "groupStatus": "enabled"})
	if err != nil {
		t.Fatal(err)
	}
	s.curl(t, b, "-X", "PUT", "--data-binary", "@-", s.Endpoint+admin+"update-group-members")
}

// SetGroup enables or disables a group (mc admin group enable, disable).
func (s *Server) SetGroup(t testing.TB, group string, on bool) {
	t.Helper()
	s.curl(t, nil, "-X", "PUT", s.Endpoint+admin+"set-group-status?group="+url.QueryEscape(group)+"&status="+status(on))
}

// Attach makes policies hold for a user or a group, and no others (mc admin
// policy attach).
func (s *Server) Attach(t testing.TB, policies, name string, group bool) {
	t.Helper()
	s.curl(t, nil, "-X", "PUT", s.Endpoint+admin+"set-user-or-group-policy?isGroup="+strconv.FormatBool(group)+"&policyName="+url.QueryEscape(policies)+
		"&userOrGroup="+url.QueryEscape(name))
}

// AddServiceAccount makes a service account of a user (mc admin accesskey
// create). Without a policy it has its user's rights; without an end it has none.
func (s *Server) AddServiceAccount(t testing.TB, user, key, secret, policy string, end time.Time) {
	t.Helper()
	r := map[string]any{"targetUser": user, "accessKey": key, "secretKey": secret}
	if policy != "" {
		r["policy"] = json.RawMessage(policy)
	}
	if !end.IsZero() {
		r["expiration"] = end.UTC()
	}
	s.curl(t, s.encrypt(t, r), "-X", "PUT", "--data-binary", "@-", s.Endpoint+admin+"add-service-account")
}

// ExportIAM is the export of all users (mc admin cluster iam export).
func (s *Server) ExportIAM(t testing.TB) []byte {
	t.Helper()
	return s.curl(t, nil, s.Endpoint+admin+"export-iam")
}

func status(on bool) string {
	if on {
		return "enabled"
	}
	return "disabled"
}

// encrypt encrypts a request as madmin-go's EncryptData does: a salt, the kind (2:
// PBKDF2 and AES-256-GCM), a nonce, and one fragment of sio-go's.
func (s *Server) encrypt(t testing.TB, v any) []byte {
	t.Helper()
	plain, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 32+1+8)
	rand.Read(head)
	head[32] = 2
	key, err := pbkdf2.Key(sha256.New, s.SecretKey, head[:32], 8192, 32)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(append([]byte{}, head[33:]...), n) }
	const last = 0x80
	about := aead.Seal([]byte{last}, nonce(0), nil, nil)
	return aead.Seal(head, nonce(1), plain, about)
}
