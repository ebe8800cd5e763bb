package ec2

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rsa"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"unicode/utf16"
)

func (f *forge) cases(t *testing.T) []*vector {
	var all []*vector
	for _, family := range [][]*vector{
		f.goodManifests(t), f.signatureCases(t), f.wrappingCases(t), f.xmlCases(t), f.partCases(t), f.archiveCases(t),
	} {
		all = append(all, family...)
	}
	return all
}

// goodManifests are the spellings that have to be read.
func (f *forge) goodManifests(t *testing.T) (vs []*vector) {
	good := f.good(t)
	ok := func(name, comment string, doc []byte) *vector {
		v := &vector{name: "good/" + name, comment: comment, expect: "ok", bundle: bundle{doc, good.parts}}
		vs = append(vs, v)
		return v
	}
	re := func(name, comment string, old, new string) {
		ok(name, comment, f.resign(edit(good.doc, old, new)))
	}
	ok("plain", "as ec2-ami-tools writes it", good.doc)
	ok("final newline", "an editor's newline at the end", append(bytes.Clone(good.doc), '\n'))
	ok("double quotes", "as euca2ools quotes", f.resign([]byte(strings.ReplaceAll(string(good.doc), "'", "\""))))
	ok("declaration ascii", "euca2ools' declaration", edit(good.doc, "<?xml version='1.0'?>", "<?xml version='1.0' encoding='ASCII'?>\n"))
	ok("declaration utf-8", "encoding UTF-8, standalone", edit(good.doc, "<?xml version='1.0'?>", "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?>"))
	ok("declaration none", "no XML declaration", edit(good.doc, "<?xml version='1.0'?>", ""))
	ok("version digits", "version 20071010", edit(good.doc, "<version>2007-10-10<", "<version>20071010<"))
	ok("bundler", "the bundler is not signed", edit(good.doc, "<name>ec2-ami-tools<", "<name>somebody else<"))
	ok("indented", "white space between elements", f.resign([]byte(strings.ReplaceAll(string(good.doc), "><", ">\n  <"))))
	re("type kernel", "a kernel image", "<type>machine</type>", "<type>kernel</type><kernel_name>vmlinuz</kernel_name>")
	re("ancestry", "ancestors", "</type>", "</type><ancestry><ancestor_ami_id>ami-1</ancestor_ami_id><ancestor_ami_id>ami-2</ancestor_ami_id></ancestry>")
	re("all machine fields", "mapping, kernel, ramdisk, product codes", "</architecture>", "</architecture><block_device_mapping><mapping><virtual>ami</virtual><device>sda1</device></mapping></block_device_mapping><kernel_id>aki-1</kernel_id><ramdisk_id>ari-1</ramdisk_id><product_codes><product_code>A,B</product_code></product_codes>")
	re("euca order", "product codes before the kernel", "</architecture>", "</architecture><product_codes><product_code>A</product_code><product_code>B</product_code></product_codes><kernel_id>true</kernel_id>")
	re("misread names", "the names euca2ools reads", "</architecture>", "</architecture><block_device_mappings><block_device_mapping><virtual>ami</virtual><device>sda1</device></block_device_mapping></block_device_mappings><productcodes><product_code>A</product_code></productcodes>")
	re("references", "entities and character references", "<architecture>x86_64<", "<architecture>x&#56;6&#x5f;64 &amp;&lt;&gt;&quot;&apos;&#233;<")
	re("utf-8", "text in UTF-8", "<architecture>x86_64<", "<architecture>x86_64 é 漢 😀<")
	re("arm64", "an architecture of today", "<architecture>x86_64<", "<architecture>arm64<")
	empty := f.archive(t, f.tar(), func(m *Manifest) { m.UserKey, m.UserIV = nil, nil })
	v := ok("no user key", "empty user_encrypted elements, opened by the cloud", empty.doc)
	v.open, v.trust = "ec2", "user"
	long := f.resign(edit(edit(empty.doc, "<user_encrypted_key algorithm='AES-128-CBC'/>", "<user_encrypted_key algorithm='AES-128-CBC'></user_encrypted_key>"), "<user_encrypted_iv/>", "<user_encrypted_iv></user_encrypted_iv>"))
	v = ok("no user key long", "the same, not self-closed", long)
	v.open, v.trust = "ec2", "user"
	v = ok("cloud", "opened with the cloud's key, the signer trusted", good.doc)
	v.open, v.trust = "ec2", "user"
	v = ok("trust list", "one of several trusted keys", good.doc)
	v.trust = "both"
	v = ok("unsigned", "UNSIGNED, allowed", setSignature(good.doc, "UNSIGNED"))
	v.allow = true
	v = ok("unsigned allowed but signed", "a good signature where none is needed", good.doc)
	v.allow = true

	old := f.good(t)
	m1 := between(old.doc, "<machine_configuration>", "</machine_configuration>")
	v3 := f.resign(edit(edit(edit(old.doc, m1, ""), "<type>machine</type>", ""), "2007-10-10", "3"))
	ok("version 3", "no machine configuration", v3)
	ok("version 2007-08-29", "no type", f.resign(edit(edit(old.doc, "<type>machine</type>", ""), "2007-10-10", "2007-08-29")))
	ok("version 20070829", "the same in digits", f.resign(edit(edit(old.doc, "<type>machine</type>", ""), "2007-10-10", "20070829")))
	ok("encrypted 2", "encrypted manifest, scheme 2", f.encryptedManifest(t, f.user.pub(), 2, good.doc))
	return vs
}

// encryptedManifest encrypts doc as a whole. Scheme 1 has one byte for the
// length of the RSA value, so it needs a key below 2048 bits.
func (f *forge) encryptedManifest(t *testing.T, to *rsa.PublicKey, scheme byte, doc []byte) []byte {
	t.Helper()
	data := bytes.Clone(doc)
	n := aes.BlockSize - len(data)%aes.BlockSize
	data = append(data, bytes.Repeat([]byte{byte(n)}, n)...)
	block, err := aes.NewCipher(f.key[:])
	if err != nil {
		t.Fatal(err)
	}
	cipher.NewCBCEncrypter(block, f.iv[:]).CryptBlocks(data, data)
	sealed := rawRSA(to, append(bytes.Clone(f.key[:]), f.iv[:]...))
	if scheme == 1 {
		return append(append([]byte{1, byte(len(sealed))}, sealed...), data...)
	}
	return append(append(binary.BigEndian.AppendUint16([]byte{2}, uint16(len(sealed))), sealed...), data...)
}

// rawRSA is PKCS#1 v1.5 encryption with fixed padding.
func rawRSA(pub *rsa.PublicKey, msg []byte) []byte {
	em := bytes.Repeat([]byte{0x5a}, pub.Size())
	em[0], em[1] = 0, 2
	em[len(em)-len(msg)-1] = 0
	copy(em[len(em)-len(msg):], msg)
	c := new(big.Int).Exp(new(big.Int).SetBytes(em), big.NewInt(int64(pub.E)), pub.N)
	return c.FillBytes(make([]byte, pub.Size()))
}

func (f *forge) signatureCases(t *testing.T) (vs []*vector) {
	good := f.good(t)
	sig := f.signatureOf(good.doc)
	add := func(name, comment, expect string, doc []byte) *vector {
		v := &vector{name: "signature/" + name, comment: comment, expect: expect, bundle: bundle{doc, good.parts}}
		vs = append(vs, v)
		return v
	}
	set := func(name, comment, expect, text string) { add(name, comment, expect, setSignature(good.doc, text)) }
	h := func(b []byte) string { return hex.EncodeToString(b) }
	n := f.user.pub().N
	sigInt := new(big.Int).SetBytes(sig)
	size := f.user.pub().Size()

	add("stripped", "no signature element", "signature", edit(good.doc, between(good.doc, "<signature>", "</signature>"), ""))
	set("empty", "empty element", "signature", "")
	add("self-closed", "<signature/>", "signature", edit(good.doc, between(good.doc, "<signature>", "</signature>"), "<signature/>"))
	set("unsigned", "UNSIGNED, not allowed", "unsigned", "UNSIGNED")
	v := add("unsigned by cloud", "UNSIGNED, opened by the cloud", "unsigned", setSignature(good.doc, "UNSIGNED"))
	v.open, v.trust = "ec2", "user"
	v = add("wrong though unsigned allowed", "allowing UNSIGNED does not allow a wrong signature", "signature", setSignature(good.doc, h(make([]byte, size))))
	v.allow = true
	v = add("empty though unsigned allowed", "nor a missing one", "signature", setSignature(good.doc, ""))
	v.allow = true
	set("unsigned lower", "unsigned in lower case is no mark", "format", "unsigned")
	set("unsigned spaced", "nor with a space", "format", "UNSIGNED ")
	set("upper case", "upper-case hex would be a second spelling", "format", strings.ToUpper(h(sig)))
	set("odd", "odd number of digits", "format", h(sig)[1:])
	set("not hex", "not hex", "format", "xyz")
	set("spaced", "white space within", "format", h(sig)[:64]+"\n"+h(sig)[64:])
	set("short", "one byte less", "signature", h(sig[:len(sig)-1]))
	set("shorter", "leading byte gone", "signature", h(sig[1:]))
	set("long", "one byte more", "signature", h(sig)+"00")
	set("leading zero", "a leading zero more", "signature", "00"+h(sig))
	set("zero", "all zeros", "signature", h(make([]byte, size)))
	set("one", "the number 1", "signature", h(big.NewInt(1).FillBytes(make([]byte, size))))
	set("minus one", "modulus - 1", "signature", h(new(big.Int).Sub(n, big.NewInt(1)).FillBytes(make([]byte, size))))
	set("modulus", "the modulus", "signature", h(n.Bytes()))
	set("plus modulus", "signature + modulus", "signature", h(new(big.Int).Add(sigInt, n).Bytes()))
	set("negated", "modulus - signature", "signature", h(new(big.Int).Sub(n, sigInt).FillBytes(make([]byte, size))))
	set("flipped", "last bit flipped", "signature", h(append(bytes.Clone(sig[:size-1]), sig[size-1]^1)))
	signed := rawSigned(good.doc)
	image := signed[bytes.Index(signed, []byte("<image>")):]
	machine := signed[:bytes.Index(signed, []byte("<image>"))]
	for _, c := range []struct {
		name, comment string
		over          []byte
		key           *rsa.PrivateKey
		h             crypto.Hash
	}{
		{"by the cloud", "signed with another key", signed, f.cloud.key, crypto.SHA1},
		{"sha256", "SHA-256 instead of SHA-1", signed, f.user.key, crypto.SHA256},
		{"md5", "MD5 instead of SHA-1", signed, f.user.key, crypto.MD5},
		{"image only", "over <image> alone", image, f.user.key, crypto.SHA1},
		{"machine only", "over <machine_configuration> alone", machine, f.user.key, crypto.SHA1},
		{"swapped", "over both in the other order", append(bytes.Clone(image), machine...), f.user.key, crypto.SHA1},
		{"newline between", "with a newline between", append(append(bytes.Clone(machine), '\n'), image...), f.user.key, crypto.SHA1},
		{"reserialised", "over double quotes where the file has single ones", []byte(strings.ReplaceAll(string(signed), "'", "\"")), f.user.key, crypto.SHA1},
		{"whole file", "over the whole document", good.doc, f.user.key, crypto.SHA1},
		{"empty text", "over nothing", nil, f.user.key, crypto.SHA1},
	} {
		add(c.name, c.comment, "signature", f.signWith(good.doc, c.over, c.key, c.h))
	}
	pss := rawSignature(f.user.key, func(em []byte) { copy(em, bytes.Repeat([]byte{0xbc}, len(em))); em[0] = 0 })
	set("no padding", "something that is no PKCS#1 padding", "signature", h(pss))
	bare := rawSignature(f.user.key, func(em []byte) {
		em[0], em[1] = 0, 1
		d := sha1Sum(signed)
		for i := 2; i < len(em)-21; i++ {
			em[i] = 0xff
		}
		em[len(em)-21] = 0
		copy(em[len(em)-20:], d[:])
	})
	set("no digest info", "a digest without its algorithm", "signature", h(bare))
	other := f.archive(t, f.tar(), func(m *Manifest) { m.KernelID = "aki-other" })
	set("of another manifest", "a good signature for something else", "signature", h(f.signatureOf(other.doc)))
	add("cloud without trust", "the cloud's key, nobody trusted", "signature", good.doc).open = "ec2"
	add("trusting the wrong one", "signer not in the trust list", "signature", good.doc).trust = "ec2"

	for _, c := range []struct{ name, old, new string }{
		{"arch", "<architecture>x86_64<", "<architecture>i386<"},
		{"kernel added", "</architecture>", "</architecture><kernel_id>aki-1</kernel_id>"},
		{"name", "<name>img<", "<name>gmi<"},
		{"account", "<user>123456789012<", "<user>123456789013<"},
		{"type", "<type>machine<", "<type>kernel<"},
		{"size", "<size>700<", "<size>701<"},
		{"part name", "img.part.00", "img.part.0a"},
		{"white space", "<image><name>", "<image> <name>"},
		{"quotes", "<digest algorithm='SHA1'>", "<digest algorithm=\"SHA1\">"},
	} {
		add("changed "+c.name, "signed field changed", "signature", edit(good.doc, c.old, c.new))
	}
	for _, c := range []struct{ name, field string }{
		{"digest", "<digest algorithm='SHA1'>"},
		{"cloud key", "<ec2_encrypted_key algorithm='AES-128-CBC'>"},
		{"user key", "<user_encrypted_key algorithm='AES-128-CBC'>"},
		{"cloud iv", "<ec2_encrypted_iv>"},
		{"user iv", "<user_encrypted_iv>"},
		{"part digest", "img.part.01</filename><digest algorithm='SHA1'>"},
	} {
		i := bytes.Index(good.doc, []byte(c.field)) + len(c.field)
		doc := bytes.Clone(good.doc)
		doc[i] = "0123456789abcdef0"[strings.IndexByte("0123456789abcdef", doc[i])+1]
		add("changed "+c.name, "signed field changed", "signature", doc)
	}
	m1 := between(good.doc, "<machine_configuration>", "</machine_configuration>")
	add("downgraded to 3", "machine configuration cut out, version 3", "signature", edit(edit(good.doc, m1, ""), "2007-10-10", "3"))
	v3 := f.resign(edit(edit(good.doc, m1, ""), "2007-10-10", "3"))
	add("upgraded from 3", "machine configuration put in", "signature", edit(edit(v3, "<version>3<", "<version>2007-10-10<"), "<image>", m1+"<image>"))
	return vs
}

func (f *forge) signatureOf(doc []byte) []byte {
	s := between(doc, "<signature>", "</signature>")
	b, err := hex.DecodeString(s[11 : len(s)-12])
	if err != nil {
		panic(err)
	}
	return b
}

func rawSignature(key *rsa.PrivateKey, fill func(em []byte)) []byte {
	em := make([]byte, key.Size())
	fill(em)
	return new(big.Int).Exp(new(big.Int).SetBytes(em), key.D, key.N).FillBytes(em)
}

// wrappingCases hide the signed bytes where a search finds them, and put
// something else where a parser looks.
func (f *forge) wrappingCases(t *testing.T) (vs []*vector) {
	good := f.good(t)
	doc := string(good.doc)
	image := between(good.doc, "<image>", "</image>")
	machine := between(good.doc, "<machine_configuration>", "</machine_configuration>")
	signature := between(good.doc, "<signature>", "</signature>")
	forged := strings.Replace(image, "<name>img<", "<name>evil<", 1)
	add := func(name, comment, text string) *vector {
		v := &vector{name: "wrapping/" + name, comment: comment, expect: "format", bundle: bundle{[]byte(text), good.parts}}
		vs = append(vs, v)
		return v
	}
	// The real element is forged; the signed one is a decoy at some place.
	base := strings.Replace(doc, image, forged, 1)
	places := []struct{ name, before string }{
		{"before the root", "<manifest>"},
		{"first in the root", "<version>"},
		{"in the version", "2007-10-10</version>"},
		{"in the bundler", "<name>ec2-ami-tools"},
		{"before machine", "<machine_configuration>"},
		{"in machine", "<architecture>"},
		{"before image", "<image>"},
		{"in image", "<name>evil"},
		{"before signature", "<signature>"},
		{"in signature", "</signature>"},
		{"last in the root", "</manifest>"},
	}
	for _, kind := range []struct{ name, open, close string }{
		{"comment", "<!--", "-->"}, {"cdata", "<![CDATA[", "]]>"}, {"pi", "<?x ", "?>"}, {"element", "", ""}, {"unknown element", "<x>", "</x>"},
	} {
		for _, place := range places {
			add(kind.name+" "+place.name, "signed <image> as a "+kind.name+", a forged one in its stead",
				strings.Replace(base, place.before, kind.open+image+kind.close+place.before, 1))
		}
	}
	add("entity", "signed bytes in an internal subset", strings.Replace(base, "<manifest>", "<!DOCTYPE manifest [<!ENTITY x '"+image+"'>]><manifest>", 1))
	add("attribute", "signed bytes in an attribute", strings.Replace(base, "<manifest>", "<manifest x=\""+strings.ReplaceAll(image, "\"", "'")+"\">", 1))
	add("after the root", "signed bytes after the end", base+image)
	add("second document", "a second document", base+doc)
	add("second document first", "the forged document second", doc+base)
	add("nul", "a NUL and more after the end", doc+"\x00"+base)
	add("image twice", "two images, the signed one first", strings.Replace(doc, "<signature>", forged+"<signature>", 1))
	add("machine twice", "two machine configurations", strings.Replace(doc, "<image>", machine+"<image>", 1))
	add("signature twice", "two signatures", strings.Replace(doc, signature, signature+signature, 1))
	add("version twice", "two versions", strings.Replace(doc, "<version>", "<version>3</version><version>", 1))
	add("wrapped", "image one level down", strings.Replace(strings.Replace(doc, "<image>", "<wrap><image>", 1), "</image>", "</image></wrap>", 1))
	add("prefix", "a namespace prefix", strings.NewReplacer("<image>", "<x:image>", "</image>", "</x:image>").Replace(base)+"")
	add("default namespace", "a default namespace on the root", strings.Replace(doc, "<manifest>", "<manifest xmlns='http://x/'>", 1))
	add("prefixed namespace", "a declared prefix on the root", strings.Replace(doc, "<manifest>", "<manifest xmlns:x='http://x/'>", 1))
	add("case", "another case of the name", strings.NewReplacer("<image>", "<Image>", "</image>", "</Image>").Replace(doc))
	add("upper case root", "another case of the root", strings.NewReplacer("<manifest>", "<MANIFEST>", "</manifest>", "</MANIFEST>").Replace(doc))
	add("space in the tag", "<image > is not found by a search", strings.Replace(doc, "<image>", "<image >", 1))
	add("newline in the tag", "nor <image with a newline", strings.Replace(doc, "<image>", "<image\n>", 1))
	add("space in the end tag", "nor </image >", strings.Replace(doc, "</image>", "</image >", 1))
	add("attribute on image", "nor <image x='1'>", strings.Replace(doc, "<image>", "<image x='1'>", 1))
	add("image first", "image before machine configuration", strings.Replace(strings.Replace(doc, image, "", 1), machine, image+machine, 1))
	add("signature first", "signature before image", strings.Replace(strings.Replace(doc, signature, "", 1), machine, signature+machine, 1))
	add("bom", "a UTF-8 byte order mark", "\xef\xbb\xbf"+doc)
	add("utf-16le", "UTF-16, little-endian", string(utf16Bytes(doc, binary.LittleEndian, true)))
	add("utf-16be", "UTF-16, big-endian", string(utf16Bytes(doc, binary.BigEndian, true)))
	add("utf-16 no bom", "UTF-16 without a mark", string(utf16Bytes(doc, binary.LittleEndian, false)))
	add("encoding utf-7", "a declaration of UTF-7", strings.Replace(doc, "<?xml version='1.0'?>", "<?xml version='1.0' encoding='UTF-7'?>", 1))
	add("encoding latin", "a declaration of ISO-8859-1", strings.Replace(doc, "<?xml version='1.0'?>", "<?xml version='1.0' encoding='ISO-8859-1'?>", 1))
	add("space before the declaration", "the declaration not at the beginning", " "+doc)
	add("xml 1.1", "XML 1.1", strings.Replace(doc, "version='1.0'", "version='1.1'", 1))
	add("text in the root", "text beside elements", strings.Replace(doc, "<image>", "text<image>", 1))
	add("text in image", "text beside elements, signed", string(f.resign([]byte(strings.Replace(doc, "<name>img", "text<name>img", 1)))))
	return vs
}

func utf16Bytes(s string, order binary.AppendByteOrder, bom bool) []byte {
	var b []byte
	if bom {
		b = order.AppendUint16(b, 0xfeff)
	}
	for _, u := range utf16.Encode([]rune(s)) {
		b = order.AppendUint16(b, u)
	}
	return b
}

// xmlCases are hostile or broken documents, most of them with a good
// signature over what is wrong.
func (f *forge) xmlCases(t *testing.T) (vs []*vector) {
	good := f.good(t)
	add := func(name, comment, expect string, doc []byte) {
		vs = append(vs, &vector{name: "xml/" + name, comment: comment, expect: expect, bundle: bundle{doc, good.parts}})
	}
	re := func(name, comment, expect, old, new string) {
		add(name, comment, expect, f.resign(edit(good.doc, old, new)))
	}
	decl := "<?xml version='1.0'?>"
	add("billion laughs", "entities of entities", "format", edit(good.doc, decl, decl+"<!DOCTYPE m [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;'><!ENTITY c '&b;&b;&b;&b;'>]>"))
	add("external entity", "a file's content", "format", edit(good.doc, decl, decl+"<!DOCTYPE m [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>"))
	add("external subset", "a document type elsewhere", "format", edit(good.doc, decl, decl+"<!DOCTYPE manifest SYSTEM 'http://x/x.dtd'>"))
	count := fmt.Sprintf("count='%d'", len(good.parts))
	for _, field := range []struct{ name, old, open, close string }{
		{"size", "<size>700</size>", "<size>", "</size>"},
		{"bundled size", between(good.doc, "<bundled_size>", "</bundled_size>"), "<bundled_size>", "</bundled_size>"},
		{"count", count, "count='", "'"},
		{"index", "index='1'", "index='", "'"},
	} {
		for _, v := range []struct{ name, text string }{
			{"negative", "-1"},
			{"plus", "+1"},
			{"exponent", "1e3"},
			{"hex", "0x10"},
			{"empty", ""},
			{"space", " 1"},
			{"leading zero", "01"},
			{"fraction", "1.5"},
			{"nan", "NaN"},
			{"overflow", "99999999999999999999"},
			{"2 to the 63", "9223372036854775808"},
			{"200 digits", strings.Repeat("9", 200)},
		} {
			re(field.name+" "+v.name, "a number that is none", "format", field.old, field.open+v.text+field.close)
		}
	}
	for name, text := range map[string]string{
		"undefined entity": "&nbsp;", "bare ampersand": "a & b", "nul reference": "&#0;", "control reference": "&#1;", "surrogate reference": "&#xD800;",
		"non-character reference": "&#xFFFE;", "huge reference": "&#1114112;", "overlong reference": "&#00000000000000065;", "signed reference": "&#-1;",
		"upper reference": "&#X41;", "empty reference": "&#;", "nul": "a\x00b", "control": "a\x01b", "invalid utf-8": "a\xff", "overlong utf-8": "a\xc0\xaf",
		"surrogate utf-8": "\xed\xa0\x80", "carriage return": "a\rb", "delete": "a\x7f", "bare greater": "a>b", "cdata end": "a]]>b",
	} {
		re("text "+name, "in the text of a signed element", "format", "<architecture>x86_64<", "<architecture>"+text+"<")
	}
	add("ascii with utf-8", "declared ASCII, is not", "format", f.resign(edit(edit(good.doc, decl, "<?xml version='1.0' encoding='ASCII'?>"), "x86_64", "é")))
	for _, c := range []struct{ name, old, new string }{
		{"attribute twice", "<parts count=", "<parts count='9' count="},
		{"attribute bare", "<part index='0'>", "<part index=0>"},
		{"attribute unknown", "<part index='0'>", "<part index='0' x='1'>"},
		{"attribute missing", "<part index='0'>", "<part>"},
		{"attribute with less", "<part index='0'>", "<part index='<'>"},
		{"attribute with reference", "<part index='0'>", "<part index='&#48;'>"},
		{"attributes many", "<part index='0'>", "<part a='' b='' c='' d='' e=''>"},
		{"attribute long", "<part index='0'>", "<part index='" + strings.Repeat("0", 300) + "'>"},
		{"attribute spaced", "<part index='0'>", "<part index = '0'>"},
		{"digest md5", "<digest algorithm='SHA1'>", "<digest algorithm='MD5'>"},
		{"cipher other", "<ec2_encrypted_key algorithm='AES-128-CBC'>", "<ec2_encrypted_key algorithm='AES-128-ECB'>"},
		{"crossed tags", "</filename><digest", "</digest><digest"},
		{"unknown element", "<type>", "<extra>1</extra><type>"},
		{"name long", "<type>", "<" + strings.Repeat("a", 1000) + "><type>"},
		{"type unknown", "<type>machine<", "<type>toaster<"},
		{"empty image", "<size>700</size>", ""},
		{"no architecture", "<architecture>x86_64</architecture>", ""},
		{"mapping without virtual", "</architecture>", "</architecture><block_device_mapping><mapping><device>x</device></mapping></block_device_mapping>"},
		{"mapping under two names", "</architecture>", "</architecture><block_device_mapping></block_device_mapping><block_device_mappings></block_device_mappings>"},
		{"digest short", "<digest algorithm='SHA1'>", "<digest algorithm='SHA1'>00"},
		{"element in text", "<type>machine<", "<type>mach<b>ine</b><"},
	} {
		re(c.name, "signed", "format", c.old, c.new)
	}
	for _, field := range []string{"name>img</name", "user>123456789012</user", "bundled_size", "ec2_encrypted_iv", "user_encrypted_iv"} {
		text := "<" + field + ">"
		if !strings.Contains(field, "<") {
			text = between(good.doc, "<"+field+">", "</"+field+">")
		}
		re("missing "+strings.SplitN(field, ">", 2)[0], "a required element is not there", "format", text, "")
	}
	for name, file := range map[string]string{
		"empty": "", "dot": ".", "dot dot": "..", "parent": "../img.part.00", "absolute": "/etc/passwd", "folder": "a/b", "nul": "a&#0;b", "newline": "a&#10;b", "tab": "a&#9;b",
		"long": strings.Repeat("a", 256), "control": "a&#x85;b",
	} {
		re("part name "+name, "a part's name that is no plain file name", "format", "<filename>img.part.00<", "<filename>"+file+"<")
		re("bundle name "+name, "a bundle's name that is no plain file name", "format", "<name>img<", "<name>"+file+"<")
	}
	add("too new", "a version to come", "too new", edit(good.doc, "2007-10-10", "2031-01-01"))
	add("too new digits", "a version to come in digits", "too new", edit(good.doc, "2007-10-10", "20071011"))
	add("too old", "version 2", "too old", edit(good.doc, "2007-10-10", "2"))
	add("never existed", "a version between", "format", edit(good.doc, "2007-10-10", "2007-09-01"))
	add("version text", "a version that is none", "format", edit(good.doc, "2007-10-10", "latest"))
	add("version huge", "a version of many digits", "format", edit(good.doc, "2007-10-10", strings.Repeat("9", 60)))
	add("no version", "no version", "format", edit(good.doc, "<version>2007-10-10</version>", ""))
	add("version 3 with machine", "version 3 has no machine configuration", "format", edit(good.doc, "2007-10-10", "3"))
	add("no machine", "2007-10-10 without machine configuration", "format", f.resign(edit(good.doc, between(good.doc, "<machine_configuration>", "</machine_configuration>"), "")))
	add("no image", "no image", "format", edit(good.doc, between(good.doc, "<image>", "</image>"), ""))
	add("empty file", "nothing at all", "truncated", nil)
	add("half", "the first half", "truncated", good.doc[:len(good.doc)/2])
	add("last byte missing", "all but the last byte", "truncated", good.doc[:len(good.doc)-1])
	add("html", "an error page", "format", []byte("<!DOCTYPE html><html><body>404</body></html>"))
	add("json", "another kind of file", "format", []byte(`{"manifest": 1}`))
	add("s3 error", "an S3 server's error", "format", []byte("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>NoSuchKey</Code></Error>"))
	enc := f.encryptedManifest(t, f.user.pub(), 2, good.doc)
	add("encrypted truncated", "encrypted manifest, last block missing in part", "truncated", enc[:len(enc)-5])
	add("encrypted short", "encrypted manifest, ends within its key", "truncated", enc[:100])
	add("encrypted other key", "encrypted manifest, its key damaged", "key", append(append(bytes.Clone(enc[:3]), make([]byte, 256)...), enc[259:]...))
	add("encrypted length", "encrypted manifest, a length that lies", "truncated", append([]byte{2, 0xff, 0xff}, enc[3:]...))
	return vs
}
