package chunked

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/keys"
)

// vectorKeys are the keys of the set: made from its seed, published, good for
// nothing else.
type vectorKeys struct {
	ed, other, rsa, weak, p256, p521, sk, untouched ssh.Signer
	x25519, hybrid, sshEd, sshRSA                   *keys.Identity
}

// securityKey is an sk- key without the hardware (OpenSSH's PROTOCOL.u2f).
type securityKey struct {
	priv  ed25519.PrivateKey
	flags byte
}

func (s securityKey) PublicKey() ssh.PublicKey {
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Kind        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, s.priv.Public().(ed25519.PublicKey), "ssh:"}))
	if err != nil {
		panic(err)
	}
	return key
}

func (s securityKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	app, msg := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	rest := []byte{s.flags, 0, 0, 0, 7}
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(s.priv, slices.Concat(app[:], rest, msg[:])), Rest: rest}, nil
}

func (g *generator) keys() *vectorKeys {
	signer := func(key any) ssh.Signer {
		s, err := ssh.NewSignerFromKey(key)
		g.must(err)
		return s
	}
	seed := func(what string) ed25519.PrivateKey { return ed25519.NewKeyFromSeed(name32(what)) }
	rsaKey := func(bits int) *rsa.PrivateKey {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		g.must(err)
		return k
	}
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		g.must(err)
		return k
	}
	k := &vectorKeys{
		ed: signer(seed("ed")), other: signer(seed("other")), rsa: signer(rsaKey(2048)), weak: signer(rsaKey(1024)),
		p256: signer(ec(elliptic.P256())), p521: signer(ec(elliptic.P521())),
		sk: nil, untouched: nil,
	}
	k.sk = securityKey{seed("security key"), 1}
	k.untouched = securityKey{seed("security key"), 0}

	folder := filepath.Join(vectorFolder, "keys")
	g.must(os.RemoveAll(folder))
	g.must(os.MkdirAll(folder, 0o755))
	file := func(name string, data []byte) *keys.Identity {
		g.must(os.WriteFile(filepath.Join(folder, name), data, 0o644))
		ids, err := keys.ReadIdentities(secretFile(g.t, name), nil)
		g.must(err)
		return ids[0]
	}
	openssh := func(key any) []byte {
		block, err := ssh.MarshalPrivateKey(key, "test vectors of the Instar image")
		g.must(err)
		return pem.EncodeToMemory(block)
	}
	x, err := age.GenerateX25519Identity()
	g.must(err)
	h, err := age.GenerateHybridIdentity()
	g.must(err)
	k.x25519 = file("x25519", []byte(x.String()+"\n"))
	k.hybrid = file("hybrid", []byte(h.String()+"\n"))
	k.sshEd = file("ssh-ed25519", openssh(seed("recipient")))
	k.sshRSA = file("ssh-rsa", openssh(rsaKey(2048)))
	return k
}

func (g *generator) armored(blob []byte) []byte {
	text := base64.StdEncoding.EncodeToString(blob)
	out := []byte("-----BEGIN SSH SIGNATURE-----\n")
	for len(text) > 0 {
		n := min(70, len(text))
		out = append(append(out, text[:n]...), '\n')
		text = text[n:]
	}
	return append(out, "-----END SSH SIGNATURE-----\n"...)
}

// sign signs as ssh-keygen does.
func (g *generator) sign(doc []byte, namespace string, s ssh.Signer) []byte {
	sig, err := sshsig.Sign(bytes.NewReader(doc), s, sshsig.HashSHA512, namespace)
	g.must(err)
	return slices.Concat(doc, g.armored(sig.Marshal()))
}

// text writes d even if it breaks a rule.
func docText(d document) []byte {
	f := &form{}
	f.document(d)
	return f.b
}

func line(principals, options string, s ssh.Signer) string {
	return strings.Join(strings.Fields(principals+" "+options+" "+keys.SSHKeyLine(s.PublicKey())), " ")
}

// signedVectors puts vectors of one kind of signed document into the set.
type signedVectors struct {
	g                          *generator
	kind, namespace, principal string
	keys                       *vectorKeys
	more                       []string // fields of all
}

// put adds a document signed by the trusted key. ssh-keygen, which knows
// nothing of documents, is asked about good ones only.
func (s *signedVectors) put(what, class string, doc []byte, more ...string) {
	s.g.t.Helper()
	stock := ""
	if class == "ok" {
		stock = "accepts"
	}
	s.object(what, class, s.g.sign(doc, s.namespace, s.keys.ed), stock, more...)
}

func (s *signedVectors) object(what, class string, object []byte, stock string, more ...string) {
	s.g.t.Helper()
	fields := append([]string{"principal", s.principal}, append(slices.Clone(s.more), more...)...)
	if !slices.Contains(more, "signers") {
		fields = append(fields, "signers", line(s.principal, "", s.keys.ed))
	}
	if !slices.Contains(more, "created") {
		fields = append(fields, "created", created.Format(time.RFC3339))
	}
	if stock != "" {
		fields = append(fields, "ssh-keygen", stock)
	}
	s.g.add(s.kind, what, class, object, fields...)
}

// edit replaces the one place where old stands.
func (g *generator) edit(doc []byte, old, new string) []byte {
	g.t.Helper()
	if bytes.Count(doc, []byte(old)) != 1 {
		g.t.Fatalf("%q is %d times in\n%s", old, bytes.Count(doc, []byte(old)), doc)
	}
	return bytes.Replace(doc, []byte(old), []byte(new), 1)
}

// forms are the rules that all documents have in common, broken one by one:
// first and last are two fields of the document, as "key": value.
func (g *generator) forms(put func(what, class string, doc []byte), doc []byte, first, last string) {
	bad := func(what, old, new string) { put(what, "malformed", g.edit(doc, old, new)) }
	put("version 2", "version", g.edit(doc, `"version": 1`, `"version": 2`))
	put("version 2 with fields of its own", "version", g.edit(doc, `"version": 1,`, "\"version\": 2,\n  \"new\": true,"))
	bad("version 01", `"version": 1`, `"version": 01`)
	bad("version as text", `"version": 1`, `"version": "1"`)
	bad("another format", `"format": "instar-`, `"format": "instar-x`)
	bad("no format", `  "format": "`, `  "farmat": "`)
	bad("unknown key", "  "+last, "  \"unknown\": 1,\n  "+last)
	bad("doubled key", "  "+last, "  "+last+",\n  "+last)
	bad("key in capitals", "  "+last, "  "+strings.ToUpper(last[:3])+last[3:])
	format, _, _ := strings.Cut(string(doc[len("{\n  "):]), ",\n")
	bad("keys in another order", format+",\n  \"version\": 1", "\"version\": 1,\n  "+format)
	bad("a comma too many", "\n  "+first, "")
	bad("key left out", ",\n  "+last, "")
	bad("tab", "  "+first, "\t"+first)
	bad("no blank behind a key", first, strings.Replace(first, ": ", ":", 1))
	put("in one line", "malformed", append(bytes.ReplaceAll(bytes.TrimSpace(doc), []byte("\n"), nil), '\n'))
	put("CRLF", "malformed", bytes.ReplaceAll(doc, []byte("\n"), []byte("\r\n")))
	put("byte order mark", "malformed", append([]byte("\ufeff"), doc...))
	put("blank behind", "malformed", append(bytes.TrimRight(bytes.Clone(doc), "\n"), " \n"...))
	put("empty line behind", "malformed", append(bytes.Clone(doc), '\n'))
	put("twice", "malformed", append(bytes.Clone(doc), doc...))
	put("an array", "malformed", slices.Concat([]byte("[\n"), doc, []byte("]\n")))
	put("not JSON", "malformed", []byte("hello\n"))
	put("cut", "malformed", append(bytes.Clone(doc[:len(doc)/2]), '\n'))
}

func (g *generator) documents() {
	k := g.keys()
	g.manifests(k)
	g.heads(k)
	g.domainsAndKeys(k)
	g.plain(k)
	g.signatures(k)
	g.allowed(k)
	g.recipients(k)
}

func (g *generator) manifests(k *vectorKeys) {
	s := &signedVectors{g: g, kind: "manifest", namespace: NamespaceImage, principal: "machine-1", keys: k}
	doc := docText(testManifest())
	s.put("of all fields", "ok", doc)
	least := testManifest()
	least.Parent, least.Description, least.RootDevice, least.Cmdline = Name{}, "", "", ""
	least.BlockDeviceMapping, least.Streams, least.Index.Segments, least.Packs = nil, least.Streams[:1], nil, nil
	least.Data, least.Added = 0, 0
	s.put("of the fewest fields", "ok", docText(least))
	g.forms(func(what, class string, d []byte) { s.put(what, class, d) }, doc, `"sequence": 7`, `"tool": "instar 1.0"`)

	field := func(what, class string, change func(*Manifest)) {
		m := testManifest()
		change(m)
		s.put(what, class, docText(m))
	}
	bad := func(what string, change func(*Manifest)) { field(what, "malformed", change) }
	field("of another image", "other", func(m *Manifest) { m.Name = "machine-2" })
	bad("name with a slash", func(m *Manifest) { m.Name = "machine/1" })
	bad("name begins with a dot", func(m *Manifest) { m.Name = ".machine" })
	bad("name of 129 characters", func(m *Manifest) { m.Name = strings.Repeat("m", 129) })
	bad("sequence 0", func(m *Manifest) { m.Sequence = 0 })
	bad("sequence beyond 2^53", func(m *Manifest) { m.Sequence = 1 << 53 })
	bad("negative sequence", func(m *Manifest) { m.Sequence = -1 })
	bad("no domain", func(m *Manifest) { m.Domain = "" })
	bad("control character in the description", func(m *Manifest) { m.Description = "\x1b[2J" })
	bad("description turns the direction", func(m *Manifest) { m.Description = "\u202eelif" })
	bad("description of 256 bytes", func(m *Manifest) { m.Description = strings.Repeat("d", 256) })
	bad("description is not UTF-8", func(m *Manifest) { m.Description = "\xff" })
	bad("architecture amd64", func(m *Manifest) { m.Architecture = "amd64" })
	bad("partition dos", func(m *Manifest) { m.Partition = "dos" })
	bad("filesystem with a blank", func(m *Manifest) { m.Filesystem = "ext 4" })
	bad("root device with parameters", func(m *Manifest) { m.RootDevice = "/dev/sda1 init=/bin/sh" })
	bad("root device not in dev", func(m *Manifest) { m.RootDevice = "sda1" })
	bad("mapping without device", func(m *Manifest) { m.BlockDeviceMapping[0].Device = "" })
	bad("no disk", func(m *Manifest) { m.Streams = m.Streams[1:] })
	bad("streams do not ascend", func(m *Manifest) { m.Streams[0], m.Streams[1] = m.Streams[1], m.Streams[0] })
	bad("kernel without digest", func(m *Manifest) { m.Streams[2].SHA256 = "" })
	bad("digest in capitals", func(m *Manifest) { m.Streams[2].SHA256 = strings.Repeat("AB", 32) })
	bad("disk with digest", func(m *Manifest) { m.Streams[0].SHA256 = strings.Repeat("ab", 32) })
	bad("cmdline without kernel", func(m *Manifest) { m.Streams = m.Streams[:1]; m.Data = 0 })
	bad("initrd without kernel", func(m *Manifest) { m.Streams = m.Streams[:2]; m.Cmdline = "" })
	bad("streams beyond 2^53 bytes", func(m *Manifest) { m.Streams[0].Size = 1<<53 - 1 })
	bad("root too small", func(m *Manifest) { m.Index.Root.Size = 29 })
	bad("root among the segments", func(m *Manifest) { m.Index.Root = m.Index.Segments[0] })
	bad("segments do not ascend", func(m *Manifest) {
		m.Index.Segments[0], m.Index.Segments[1] = m.Index.Segments[1], m.Index.Segments[0]
	})
	bad("segment beyond its limit", func(m *Manifest) { m.Index.Segments[0].Size = maxStoredSegment + 1 })
	bad("a pack twice", func(m *Manifest) { m.Packs[1] = m.Packs[0] })
	bad("packs do not ascend", func(m *Manifest) { m.Packs[0], m.Packs[1] = m.Packs[1], m.Packs[0] })
	bad("pack beyond 256 MiB", func(m *Manifest) { m.Packs[0].Size = MaxPack + 1 })
	bad("pack too small to be one", func(m *Manifest) { m.Packs[0].Size = minPack - 1 })
	bad("data without packs", func(m *Manifest) { m.Packs, m.Added = nil, 0 })
	bad("data without segments", func(m *Manifest) { m.Index.Segments = nil })
	bad("more data than streams", func(m *Manifest) { m.Data = 1 << 50 })
	bad("more added than packs", func(m *Manifest) { m.Added = 1 << 40 })
	bad("no tool", func(m *Manifest) { m.Tool = "" })

	edit := func(what, old, new string) { s.put(what, "malformed", g.edit(doc, old, new)) }
	edit("time with fractions", `05:30:00Z`, `05:30:00.0Z`)
	edit("time in another zone", `05:30:00Z`, `05:30:00+00:00`)
	edit("time that is none", `2026-11-22T05`, `2026-11-31T25`)
	edit("number with exponent", `"sequence": 7`, `"sequence": 7e0`)
	edit("number with fraction", `"sequence": 7`, `"sequence": 7.0`)
	edit("number with leading zero", `"sequence": 7`, `"sequence": 07`)
	edit("number beyond 64 bits", `"sequence": 7`, `"sequence": 99999999999999999999`)
	edit("escape where none is needed", `"name": "machine-1"`, `"name": "machine\u002d1"`)
	edit("slash escaped", `/dev/sda1",`+"\n  \"block", `\/dev/sda1",`+"\n  \"block")
	edit("null for a list", `"block_device_mapping": [`+"\n", `"block_device_mapping": null, "x": [`+"\n")
	edit("empty optional text", `"cmdline": "console=ttyS0 ro"`, `"cmdline": ""`)
	edit("parent of zeros", nameN(0).String(), strings.Repeat("0", 64))
	edit("parent in capitals", nameN(0).String(), strings.ToUpper(nameN(0).String()))
	edit("parent cut", nameN(0).String(), nameN(0).String()[:62])
	s.put("empty list with a blank in it", "malformed", g.edit(docText(least), `"packs": []`, `"packs": [ ]`))

	good := g.sign(doc, s.namespace, k.ed)
	sig := good[len(doc):]
	sign := func(what, class string, object []byte, stock string, more ...string) {
		s.object(what, class, object, stock, more...)
	}
	sign("no signature", "signature", doc, "refuses")
	sign("signature alone", "signature", sig, "refuses")
	sign("nothing", "signature", nil, "refuses")
	sign("a byte of the document changed", "signature", g.edit(good, "machine-1", "machine-2"), "refuses")
	sign("signature of another document", "signature", slices.Concat(docText(least), sig), "refuses")
	sign("a bit of the signature changed", "signature", flip(good, -40), "refuses")
	sign("two signatures", "signature", slices.Concat(good, sig), "accepts") // sed takes both, ssh-keygen the first
	sign("a signed document signed again", "malformed", g.sign(good, s.namespace, k.ed), "accepts")
	sign("a byte behind", "signature", append(bytes.Clone(good), '\n'), "accepts")
	sign("text behind", "signature", append(bytes.Clone(good), "hello\n"...), "accepts")
	sign("all in CRLF", "signature", bytes.ReplaceAll(good, []byte("\n"), []byte("\r\n")), "refuses")
	sign("signature in CRLF", "signature", slices.Concat(doc, bytes.ReplaceAll(sig, []byte("\n"), []byte("\r\n"))), "refuses")
	sign("signature in other columns", "signature", slices.Concat(doc, pem.EncodeToMemory(&pem.Block{Type: "SSH SIGNATURE", Bytes: g.blob(sig)})), "accepts")
	sign("blank line before the signature", "signature", slices.Concat(doc, []byte("\n"), sig), "refuses")
	sign("a mark in front of all", "signature", append([]byte("\ufeff"), good...), "refuses")
	sign("by another key", "untrusted", g.sign(doc, s.namespace, k.other), "refuses")
	sign("by a key for another image", "untrusted", good, "refuses", "signers", line("machine-2", "", k.ed))
	sign("by a key for all images but this", "untrusted", good, "refuses", "signers", line("*,!machine-1", "", k.ed))
	sign("by a key for another namespace", "untrusted", good, "refuses", "signers", line("*", `namespaces="instar-head"`, k.ed))
	sign("nobody is trusted", "untrusted", good, "refuses", "signers", "# nobody")
	sign("by a key for all images", "ok", good, "accepts", "signers", line("*", "", k.ed))
	sign("by a key for all namespaces", "ok", good, "accepts", "signers", line("machine-?", `namespaces="instar-*"`, k.ed))
	sign("by one of two keys", "ok", good, "accepts", "signers", line("*", "", k.other), "signers", line("machine-1", "", k.ed))
	sign("before the key was valid", "expired", good, "refuses", "signers", line("*", `valid-after="20261122053001Z"`, k.ed))
	sign("after the key was valid", "expired", good, "refuses", "signers", line("*", `valid-before="20261122052959Z"`, k.ed))
	sign("in the key's only second", "ok", good, "accepts", "signers", line("*", `valid-after="20261122053000Z",valid-before="20261122053001Z"`, k.ed))
	sign("in another namespace", "namespace", g.sign(doc, NamespaceHead, k.ed), "refuses")
	sign("for files", "namespace", g.sign(doc, "file", k.ed), "refuses")
	head := docText(testHead())
	sign("a head in its place", "namespace", g.sign(head, NamespaceHead, k.ed), "refuses")
	sign("a head signed as a manifest", "malformed", g.sign(head, NamespaceImage, k.ed), "accepts")
	for _, x := range []struct {
		what, class, stock string
		key                ssh.Signer
	}{
		{"by an RSA key of 2048 bits", "ok", "accepts", k.rsa},
		{"by an RSA key of 1024 bits", "key-type", "refuses", k.weak},
		{"by an ECDSA key on P-256", "ok", "accepts", k.p256},
		{"by an ECDSA key on P-521", "ok", "accepts", k.p521},
		{"by a security key", "ok", "accepts", k.sk},
		{"by a security key nobody touched", "signature", "accepts", k.untouched},
	} {
		trusted := line("*", "", x.key)
		if x.class == "key-type" {
			trusted = line("*", "", k.ed) // a file that has it is refused as a whole
		}
		sign(x.what, x.class, g.sign(doc, s.namespace, x.key), x.stock, "signers", trusted)
	}
}

// blob is what is in an armored signature.
func (g *generator) blob(armored []byte) []byte {
	p, _ := pem.Decode(armored)
	if p == nil {
		g.t.Fatal("no armor")
	}
	return p.Bytes
}

func (g *generator) heads(k *vectorKeys) {
	s := &signedVectors{g: g, kind: "head", namespace: NamespaceHead, principal: "machine-1", keys: k}
	doc := docText(testHead())
	s.put("of all fields", "ok", doc)
	s.put("of the first version", "ok", docText(&Head{Name: "machine-1", Sequence: 1, Manifest: nameN(20), Created: created}))
	gone := docText(&Head{Name: "machine-1", Sequence: 8, Created: created})
	s.put("of a deleted image", "ok", gone)
	g.forms(func(what, class string, d []byte) { s.put(what, class, d) }, doc, `"sequence": 7`, `"created": "2026-11-22T05:30:00Z"`)
	bad := func(what, class string, change func(*Head)) {
		h := testHead()
		change(h)
		s.put(what, class, docText(h))
	}
	bad("of another image", "other", func(h *Head) { h.Name = "machine-2" })
	bad("sequence 0", "malformed", func(h *Head) { h.Sequence = 0 })
	bad("sequence beyond 2^53", "malformed", func(h *Head) { h.Sequence = 1 << 53 })
	bad("deleted, but with versions", "malformed", func(h *Head) { h.Manifest = Name{} })
	bad("a version twice", "malformed", func(h *Head) { h.Versions[1] = h.Versions[0] })
	bad("the newest among the older", "malformed", func(h *Head) { h.Versions[1] = h.Manifest })
	bad("expires before it is created", "malformed", func(h *Head) { h.Expires = h.Created.Add(-time.Second) })
	s.put("no list of versions", "malformed", g.edit(gone, "  \"versions\": [],\n", ""))
	s.put("manifest null", "malformed", g.edit(gone, `"manifest": ""`, `"manifest": null`))

	good := g.sign(doc, s.namespace, k.ed)
	s.object("by another key", "untrusted", g.sign(doc, s.namespace, k.other), "refuses")
	s.object("a manifest in its place", "namespace", g.sign(docText(testManifest()), NamespaceImage, k.ed), "refuses")
	s.object("signed as a manifest", "namespace", g.sign(doc, NamespaceImage, k.ed), "refuses")
	s.object("after the key was valid", "expired", good, "refuses", "signers", line("*", `valid-before="20261122052959Z"`, k.ed))

	now := created.Add(time.Hour).Format(time.RFC3339)
	mine, theirs := keys.Fingerprint(k.ed.PublicKey()), keys.Fingerprint(k.other.PublicKey())
	seen := func(sequence int, manifest, signer string) string {
		return fmt.Sprintf("%d %s %s", sequence, manifest, signer)
	}
	same := testHead().Manifest.String()
	fresh := func(what, class string, more ...string) { s.put(what, class, doc, append(more, "now", now)...) }
	fresh("an older one was seen", "ok", "seen", seen(6, nameN(19).String(), mine))
	fresh("this one was seen", "ok", "seen", seen(7, same, mine))
	fresh("a newer one was seen", "rollback", "seen", seen(8, nameN(21).String(), mine))
	fresh("a deletion was seen", "rollback", "seen", seen(8, "deleted", mine))
	fresh("another manifest was seen under its sequence", "forked", "seen", seen(7, nameN(21).String(), mine))
	fresh("a deletion was seen under its sequence", "forked", "seen", seen(7, "deleted", mine))
	fresh("a newer one was seen, by a key that was dropped", "ok", "seen", seen(1<<53-1, nameN(21).String(), theirs))
	fresh("a newer one was seen, by another key still trusted", "rollback", "seen", seen(8, nameN(21).String(), theirs),
		"signers", line("*", "", k.ed), "signers", line("machine-1", "", k.other))
	fresh("at least its sequence is asked for", "ok", "at-least", "7")
	fresh("at least the next sequence is asked for", "rollback", "at-least", "8")
	fresh("within the age asked for", "ok", "max-age", "3600")
	fresh("beyond the age asked for", "stale", "max-age", "3599")
	s.put("at its last second", "ok", doc, "now", created.Add(24*time.Hour).Format(time.RFC3339))
	s.put("expired", "stale", doc, "now", created.Add(24*time.Hour+time.Second).Format(time.RFC3339))
}

func (g *generator) domainsAndKeys(k *vectorKeys) {
	secret, root, key := g.secret(), nameN(1), Key(name32("index key"))
	all := []struct {
		file string
		id   *keys.Identity
	}{{"x25519", k.x25519}, {"hybrid", k.hybrid}, {"ssh-ed25519", k.sshEd}, {"ssh-rsa", k.sshRSA}}
	o := &KeysObject{}
	d := &DomainDoc{Domain: "default", Sequence: 3, Created: created, Label: secret.Domain().Label()}
	for _, r := range all {
		w, err := WrapIndexKey(root, key, r.id.Recipient(), "of file "+r.file)
		g.must(err)
		o.Recipients = append(o.Recipients, w)
		w, err = WrapDomainSecret("default", secret, r.id.Recipient(), "of file "+r.file)
		g.must(err)
		d.Creators = append(d.Creators, w)
	}
	small := func() *KeysObject { return &KeysObject{slices.Clone(o.Recipients[:1])} }
	smallDomain := func() *DomainDoc { x := *d; x.Creators = slices.Clone(d.Creators[:1]); return &x }

	put := func(what, class string, b []byte, more ...string) {
		g.add("keys", what, class, b, append([]string{"root", root.String(), "key", hexOf(key)}, more...)...)
	}
	s := &signedVectors{g: g, kind: "domain", namespace: NamespaceDomain, principal: "default", keys: k, more: []string{"secret", hexOf(secret)}}
	for i, r := range all {
		more := []string{"identity", r.file}
		if r.file != "hybrid" { // age knows those from 1.3 on
			more = append(more, "age", r.file, "entry", fmt.Sprint(i))
		}
		put("opened by "+r.file, "ok", docText(o), more...)
		s.put("opened by "+r.file, "ok", docText(d), more...)
	}
	put("for another key", "no-identity", docText(small()), "identity", "ssh-ed25519")
	s.put("for another key", "no-identity", docText(smallDomain()), "identity", "ssh-ed25519")
	wrapped := func(change func(*Wrapped)) []byte { x := small(); change(&x.Recipients[0]); return docText(x) }
	again := func(payload []byte) []byte {
		w, err := keys.Wrap(payload, k.x25519.Recipient())
		g.must(err)
		return w
	}
	const id = "identity"
	put("wrapped key changed", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = flip(w.Wrapped, -1) }), id, "x25519")
	put("wrapped key cut", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = w.Wrapped[:len(w.Wrapped)-1] }), id, "x25519")
	put("a byte behind the wrapped key", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = append(bytes.Clone(w.Wrapped), 0) }), id, "x25519")
	put("wrapped key is no age file", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = []byte("hello") }), id, "x25519")
	put("wrapped for another, listed as mine", "no-identity", wrapped(func(w *Wrapped) { w.Wrapped = o.Recipients[2].Wrapped }), id, "x25519")
	put("wrapped in another name", "no-identity", wrapped(func(w *Wrapped) { w.Recipient = o.Recipients[2].Recipient }), id, "x25519")
	other := nameN(2)
	put("key of another image", "other", wrapped(func(w *Wrapped) { w.Wrapped = again(slices.Concat([]byte(indexKeyPrefix), other[:], key[:])) }), id, "x25519")
	put("a domain's secret in its place", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = d.Creators[0].Wrapped }), id, "x25519")
	put("key of 31 bytes", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = again(slices.Concat([]byte(indexKeyPrefix), root[:], key[:31])) }), id, "x25519")
	put("key of 33 bytes", "wrapped", wrapped(func(w *Wrapped) { w.Wrapped = again(slices.Concat([]byte(indexKeyPrefix), root[:], key[:], key[:1])) }), id, "x25519")

	g.forms(func(what, class string, b []byte) { put(what, class, b) }, docText(small()), `"recipients": [`, `"recipients": [`)
	put("no recipients", "malformed", docText(&KeysObject{}))
	put("a recipient twice", "malformed", docText(&KeysObject{[]Wrapped{o.Recipients[0], o.Recipients[0]}}))
	put("ECDSA recipient", "malformed", wrapped(func(w *Wrapped) { w.Recipient = keys.SSHKeyLine(k.p256.PublicKey()) }))
	put("security key as recipient", "malformed", wrapped(func(w *Wrapped) { w.Recipient = keys.SSHKeyLine(k.sk.PublicKey()) }))
	put("recipient with a comment of its own", "malformed", wrapped(func(w *Wrapped) { w.Recipient = o.Recipients[2].Recipient + " me" }))
	put("recipient in capitals", "malformed", wrapped(func(w *Wrapped) { w.Recipient = strings.ToUpper(w.Recipient) }))
	put("recipient with a wrong checksum", "malformed", wrapped(func(w *Wrapped) { w.Recipient = w.Recipient[:len(w.Recipient)-1] + "q" }))
	put("comment with an escape sequence", "malformed", wrapped(func(w *Wrapped) { w.Comment = "\x1b]0;x\a" }))
	put("comment of 256 bytes", "malformed", wrapped(func(w *Wrapped) { w.Comment = strings.Repeat("c", 256) }))
	put("nothing wrapped", "malformed", wrapped(func(w *Wrapped) { w.Wrapped = nil }))
	put("16385 bytes wrapped", "malformed", wrapped(func(w *Wrapped) { w.Wrapped = make([]byte, keys.MaxWrapped+1) }))
	put("base64 without padding", "malformed", wrapped(func(w *Wrapped) { w.Wrapped = []byte("x") }), "base64", "eA==")
	g.all["keys-base64-without-padding"].body = g.edit(g.all["keys-base64-without-padding"].body, `"eA=="`, `"eA"`)
	put("base64 with bits too many", "malformed", g.edit(wrapped(func(w *Wrapped) { w.Wrapped = []byte("x") }), `"eA=="`, `"eB=="`))

	doc := docText(smallDomain())
	g.forms(func(what, class string, b []byte) { s.put(what, class, b) }, doc, `"sequence": 3`, `"label": "`+d.Label.String()+`"`)
	field := func(what, class string, change func(*DomainDoc), more ...string) {
		x := smallDomain()
		change(x)
		s.put(what, class, docText(x), more...)
	}
	field("of another domain", "other", func(x *DomainDoc) { x.Domain = "other" })
	field("sequence 0", "malformed", func(x *DomainDoc) { x.Sequence = 0 })
	field("no creators", "malformed", func(x *DomainDoc) { x.Creators = nil })
	field("a creator twice", "malformed", func(x *DomainDoc) { x.Creators = append(x.Creators, x.Creators[0]) })
	field("another label", "foreign", func(x *DomainDoc) { x.Label[0] ^= 1 }, id, "x25519")
	field("another secret under the label", "foreign", func(x *DomainDoc) {
		w, err := WrapDomainSecret("default", Secret{1}, k.x25519.Recipient(), "")
		g.must(err)
		x.Creators[0] = w
	}, id, "x25519")
	field("another domain's secret", "other", func(x *DomainDoc) {
		w, err := WrapDomainSecret("defaulX", secret, k.x25519.Recipient(), "")
		g.must(err)
		x.Creators[0] = w
	}, id, "x25519")
	s.put("label too short", "malformed", g.edit(doc, d.Label.String(), d.Label.String()[:22]))
	s.put("label in capitals", "malformed", g.edit(doc, d.Label.String(), strings.ToUpper(d.Label.String())))
	s.object("planted by the store's owner", "untrusted", g.sign(doc, NamespaceDomain, k.other), "refuses")
	s.object("not signed", "signature", doc, "refuses")
	s.object("signed as a head", "namespace", g.sign(doc, NamespaceHead, k.ed), "refuses")
}

func (g *generator) plain(k *vectorKeys) {
	s := &signedVectors{g: g, kind: "trace", namespace: NamespaceTrace, principal: "machine-1", keys: k, more: []string{"manifest", nameN(20).String()}}
	doc := docText(testTrace())
	s.put("of two ranges", "ok", doc)
	s.put("of no range", "ok", docText(&Trace{Name: "machine-1", Manifest: nameN(20), Created: created}))
	g.forms(func(what, class string, d []byte) { s.put(what, class, d) }, doc, `"name": "machine-1"`, `"created": "2026-11-22T05:30:00Z"`)
	trace := func(what, class string, change func(*Trace)) {
		x := testTrace()
		change(x)
		s.put(what, class, docText(x))
	}
	trace("of another image", "other", func(x *Trace) { x.Name = "machine-2" })
	trace("of another manifest", "other", func(x *Trace) { x.Manifest = nameN(21) })
	trace("range of no bytes", "malformed", func(x *Trace) { x.Ranges[0].Length = 0 })
	trace("range beyond 2^53", "malformed", func(x *Trace) { x.Ranges[0].Position = 1<<53 - 4096 })
	trace("negative position", "malformed", func(x *Trace) { x.Ranges[0].Position = -1 })
	s.put("range of three numbers", "malformed", g.edit(doc, "      4096\n", "      4096,\n      1\n"))
	s.object("by another key", "untrusted", g.sign(doc, NamespaceTrace, k.other), "refuses")
	s.object("signed as a manifest", "namespace", g.sign(doc, NamespaceImage, k.ed), "refuses")

	list := func(what, class string, b []byte) { g.add("condemned", what, class, b) }
	doc = docText(testCondemned())
	list("of all kinds of object", "ok", doc)
	g.forms(list, doc, `"created": "2026-11-22T05:30:00Z"`, `"created": "2026-11-22T05:30:00Z"`)
	objects := func(what string, keys ...string) { list(what, "malformed", docText(&Condemned{created, keys})) }
	objects("nothing at all")
	objects("a head", HeadKey("machine-1"))
	objects("a manifest", ManifestKey("machine-1", nameN(1)))
	objects("a domain", DomainKey("default"))
	objects("a pack in another's folder", "packs/00/"+nameN(1).String())
	objects("a pack by half a name", PackKey(nameN(1))[:40])
	objects("a way out of the store", "../"+PackKey(nameN(1)))
	objects("keys of an image called ..", "images/../keys/"+nameN(1).String())
	objects("a folder", PacksFolder)
	objects("an object twice", PackKey(nameN(1)), PackKey(nameN(1)))
	objects("not ascending", PackKey(nameN(1)), IndexObjectKey(nameN(1)))

	run := func(what, class string, b []byte) { g.add("run", what, class, b) }
	doc = docText(&RunDoc{"machine-1", created})
	run("put again", "ok", doc)
	run("put first", "ok", docText(&RunDoc{Name: "machine-1"}))
	g.forms(run, doc, `"name": "machine-1"`, `"name": "machine-1"`)
	run("no name", "malformed", docText(&RunDoc{Started: created}))
	run("started in 1970", "malformed", docText(&RunDoc{"machine-1", time.Unix(0, 0)}))
	run("longer than 4 KiB", "limit", append(bytes.Clone(doc), bytes.Repeat([]byte{'\n'}, MaxRun)...))
}

func (g *generator) signatures(k *vectorKeys) {
	const message, space = "hello", "instar-image"
	put := func(what, class string, armored []byte) {
		g.add("signature", what, class, armored, "message", message, "namespace", space)
	}
	sign := func(s ssh.Signer, h sshsig.HashAlgorithm) *sshsig.Signature {
		sig, err := sshsig.Sign(strings.NewReader(message), s, h, space)
		g.must(err)
		return sig
	}
	of := func(s ssh.Signer) []byte { return g.armored(sign(s, sshsig.HashSHA512).Marshal()) }
	good := of(k.ed)
	put("by ed25519", "ok", good)
	put("by RSA", "ok", of(k.rsa))
	put("by ECDSA P-256", "ok", of(k.p256))
	put("by ECDSA P-521", "ok", of(k.p521))
	put("by a security key", "ok", of(k.sk))
	put("by a security key nobody touched", "signature", of(k.untouched))
	put("by RSA of 1024 bits", "key-type", of(k.weak))
	put("over a SHA-256 digest", "signature", g.armored(sign(k.ed, sshsig.HashSHA256).Marshal()))
	change := func(what, class string, change func(*sshsig.Signature)) {
		sig := sign(k.ed, sshsig.HashSHA512)
		change(sig)
		put(what, class, g.armored(sig.Marshal()))
	}
	change("version 2", "signature", func(s *sshsig.Signature) { s.Version = 2 })
	change("another namespace", "namespace", func(s *sshsig.Signature) { s.Namespace = "instar-head" })
	change("another key", "signature", func(s *sshsig.Signature) { s.PublicKey = k.other.PublicKey() })
	change("another kind of signature", "signature", func(s *sshsig.Signature) { s.Signature.Format = "ssh-rsa" })
	change("bytes behind the signature itself", "signature", func(s *sshsig.Signature) { s.Signature.Rest = []byte{1} })
	change("signature cut", "signature", func(s *sshsig.Signature) { s.Signature.Blob = s.Signature.Blob[:63] })
	change("signature of zeros", "signature", func(s *sshsig.Signature) { s.Signature.Blob = make([]byte, 64) })
	rsa512 := sign(k.rsa, sshsig.HashSHA512)
	rsa512.Signature.Format = ssh.KeyAlgoRSASHA256
	put("RSA with SHA-256", "signature", g.armored(rsa512.Marshal()))
	text := string(good)
	bad := func(what, text string) { put(what, "signature", []byte(text)) }
	bad("nothing", "")
	bad("no newline at the end", strings.TrimRight(text, "\n"))
	bad("empty line behind", text+"\n")
	bad("empty line in front", "\n"+text)
	bad("blank at the end of a line", strings.Replace(text, "\n", " \n", 1))
	bad("CRLF", strings.ReplaceAll(text, "\n", "\r\n"))
	bad("in one line", "-----BEGIN SSH SIGNATURE-----\n"+strings.ReplaceAll(strings.Join(strings.Split(text, "\n")[1:len(strings.Split(text, "\n"))-2], ""), "\n", "")+"\n-----END SSH SIGNATURE-----\n")
	bad("of a PGP kind", strings.ReplaceAll(text, "SSH", "PGP"))
	bad("headers", strings.Replace(text, "\n", "\nVersion: 1\n\n", 1))
	bad("not base64", strings.Replace(text, "U1NI", "U1N*", 1))
	put("bytes behind", "signature", g.armored(append(g.blob(good), 0)))
	put("another magic", "signature", g.armored(flip(g.blob(good), 0)))
	bad("longer than 16 KiB", text+strings.Repeat("A", keys.MaxSignature))
}

func (g *generator) allowed(k *vectorKeys) {
	put := func(what, class, file string) {
		g.add("allowed-signers", what, class, []byte(file), "key", keys.SSHKeyLine(k.ed.PublicKey()), "principal", "machine-1",
			"namespace", "instar-image", "time", created.Format(time.RFC3339))
	}
	key := keys.SSHKeyLine(k.ed.PublicKey())
	put("name", "ok", "machine-1 "+key+"\n")
	put("list, quoted, comment", "ok", "# who\n\n\"a,machine-1\" "+key+" a comment\n")
	put("patterns", "ok", "machine-*,!machine-9 "+key+"\n")
	put("options", "ok", `machine-? namespaces="file,instar-*",valid-after="20260101Z",valid-before="20270101Z" `+key+"\n")
	put("options in capitals", "ok", `* NAMESPACES="*" `+key+"\n")
	put("CRLF", "ok", "machine-1 "+key+"\r\n")
	put("second line", "ok", line("*", "", k.other)+"\n"+line("*", "", k.ed)+"\n")
	put("expired line, then one without limit", "ok", `* valid-before="20200101Z" `+key+"\n* "+key+"\n")
	put("nothing", "untrusted", "")
	put("another name", "untrusted", "machine-2 "+key+"\n")
	put("name is a prefix", "untrusted", "machine "+key+"\n")
	put("forbidden", "untrusted", "*,!machine-1 "+key+"\n")
	put("only forbidden", "untrusted", "!machine-2 "+key+"\n")
	put("another key", "untrusted", line("*", "", k.other)+"\n")
	put("commented out", "untrusted", "# * "+key+"\n")
	put("another namespace", "untrusted", `* namespaces="file" `+key+"\n")
	put("expired", "expired", `* valid-before="20261122052959Z" `+key+"\n")
	put("not yet valid", "expired", `* valid-after="20261122053001Z" `+key+"\n")
	bad := func(what, file string) { put(what, "allowed-signers", file) }
	bad("certificate authority", "* cert-authority "+key+"\n")
	bad("unknown option", "* no-touch-required "+key+"\n")
	bad("option twice", `* namespaces="*",namespaces="*" `+key+"\n")
	bad("option without quotes", "* namespaces=* "+key+"\n")
	bad("quote not closed", `* namespaces="* `+key+"\n")
	bad("time that is none", `* valid-after="2026" `+key+"\n")
	bad("valid-before is before valid-after", `* valid-after="20270101Z",valid-before="20260101Z" `+key+"\n")
	bad("empty pattern", "a,, "+key+"\n")
	bad("no principals", key+"\n")
	bad("no key", "machine-1\n")
	bad("weak key for another", line("other", "", k.weak)+"\nmachine-1 "+key+"\n")
	bad("kind and key differ", "* ssh-rsa "+strings.Fields(key)[1]+"\n")
	bad("key cut", "* "+key[:60]+"\n")
	bad("byte order mark", "\ufeff* "+key+"\n")
	bad("not UTF-8", "# \xff\n* "+key+"\n")
}

func (g *generator) recipients(k *vectorKeys) {
	put := func(what, class, line string) { g.add("recipient", what, class, []byte(line)) }
	put("X25519", "ok", k.x25519.Recipient().String())
	put("hybrid", "ok", k.hybrid.Recipient().String())
	put("ssh-ed25519", "ok", k.sshEd.Recipient().String())
	put("ssh-rsa with a comment", "ok", k.sshRSA.Recipient().String()+" me@here\n")
	put("ECDSA", "recipient", keys.SSHKeyLine(k.p256.PublicKey()))
	put("security key", "recipient", keys.SSHKeyLine(k.sk.PublicKey()))
	put("RSA of 1024 bits", "recipient", keys.SSHKeyLine(k.weak.PublicKey()))
	put("plugin", "recipient", "age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t")
	put("wrong checksum", "recipient", k.x25519.Recipient().String()[:61]+"q")
	put("in capitals", "recipient", strings.ToUpper(k.x25519.Recipient().String()))
	put("nothing", "recipient", "")
	put("secret key", "recipient", "AGE-SECRET-KEY-1QQQQ")
	put("two lines", "recipient", k.x25519.Recipient().String()+"\n"+k.sshEd.Recipient().String())
}
