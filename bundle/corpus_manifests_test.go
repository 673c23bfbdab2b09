package bundle_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// jsonTexts are JSON values (true), and what some parser takes for one (false).
// Where RFC 8259 leaves a choice, it is the one of package strictjson.
var jsonTexts = []struct {
	text string
	ok   bool
}{
	{`null`, true}, {`true`, true}, {`false`, true}, {`0`, true}, {`-0`, true}, {`1`, true}, {`-1`, true}, {`12345678901234567890123`, true},
	{`0.5`, true}, {`-0.0`, true}, {`1e5`, true}, {`1E+5`, true}, {`1.5e-300`, true}, {`1e400`, true}, {`""`, true}, {`"a"`, true}, {`" "`, true},
	{`"\"\\\/\b\f\n\r\t"`, true}, {`"\u0041"`, true}, {`"\u0000"`, true}, {`"\u001f"`, true}, {`"\u007f"`, true}, {"\"\x7f\"", true},
	{`"\ud83d\ude00"`, true}, {`"\uD83D\uDE00"`, true}, {"\"\u00fc\"", true}, {"\"\U0001f600\"", true}, {"\"\u2028\u2029\"", true}, {"\"\ufeff\"", true}, {"\"\ufffd\"", true}, {"\"\uffff\"", true}, {`"\uffff"`, true},
	{`[]`, true}, {`[ ]`, true}, {`[1]`, true}, {`[1,2]`, true}, {`[[],{}]`, true}, {`[null,true,"a",{"b":[]}]`, true}, {"[\n\t\r 1]", true},
	{`{}`, true}, {`{"":0}`, true}, {`{"a":0}`, true}, {`{"a":0,"b":0}`, true}, {`{"a":{"a":{"a":0}}}`, true}, {`{"a b":"\u0061"}`, true}, {`{"\u0061":0}`, true},
	{strings.Repeat("[", 15) + strings.Repeat("]", 15), true}, {`"` + strings.Repeat("x", 1000) + `"`, true}, {`[` + strings.Repeat("0,", 999) + `0]`, true},

	{``, false}, {`,`, false}, {`nul`, false}, {`Null`, false}, {`NULL`, false}, {`True`, false}, {`tru`, false}, {`truee`, false}, {`undefined`, false}, {`NaN`, false}, {`Infinity`, false}, {`-Infinity`, false},
	{`+1`, false}, {`01`, false}, {`-01`, false}, {`00`, false}, {`.5`, false}, {`1.`, false}, {`-.5`, false}, {`-`, false}, {`--1`, false}, {`1e`, false}, {`1e+`, false}, {`e1`, false}, {`1.e1`, false}, {`1.5.5`, false}, {`0x1f`, false}, {`0b1`, false}, {`0o7`, false}, {`1_000`, false}, {`1,000`, false}, {`1 2`, false}, {`- 1`, false}, {"\uff11", false}, {`1f`, false}, {`0e`, false},
	{`"`, false}, {`"a`, false}, {`a"`, false}, {`'a'`, false}, {"`a`", false}, {`"\`, false}, {`"\"`, false}, {`"\x41"`, false}, {`"\a"`, false}, {`"\0"`, false}, {`"\'"`, false}, {`"\U0041"`, false}, {`"\u"`, false}, {`"\u004"`, false}, {`"\u00g1"`, false}, {`"\u+041"`, false}, {"\"\\\n\"", false}, {"\"\n\"", false}, {"\"\t\"", false}, {"\"\x00\"", false}, {"\"\x1f\"", false}, {`"a" "b"`, false}, {`"a"b`, false},
	{`"\ud800"`, false}, {`"\udc00"`, false}, {`"\ud800\ud800"`, false}, {`"\ud800x"`, false}, {`"\ud800\n"`, false}, {`"\udc00\ud800"`, false}, {`"\ud83d\u0041"`, false}, {`"\ud800\\udc00"`, false}, {`{"\ud800":0}`, false},
	{"\"\xff\"", false}, {"\"\x80\"", false}, {"\"\xc0\xaf\"", false}, {"\"\xe0\x80\x80\"", false}, {"\"\xed\xa0\x80\"", false}, {"\"\xf4\x90\x80\x80\"", false}, {"\"\xf8\x88\x80\x80\x80\"", false}, {"\"\xc3\"", false}, {"\"\xe2\x82\"", false}, {"{\"\xff\":0}", false}, {"\xff", false},
	{`[`, false}, {`]`, false}, {`[1`, false}, {`[1,`, false}, {`[1,]`, false}, {`[,1]`, false}, {`[,]`, false}, {`[1,,2]`, false}, {`[1 2]`, false}, {`[1:2]`, false}, {`[1}`, false}, {`[1]]`, false}, {`[1],`, false}, {`(1)`, false}, {`<1>`, false}, {`[a]`, false}, {`[1]x`, false}, {`[1] // x`, false}, {`[1] # x`, false}, {`/**/[1]`, false}, {`[1]/**/`, false}, {"[1]\x00", false}, {"\x00[1]", false}, {"\u00a0[1]", false}, {"\v[1]", false}, {"\f[1]", false}, {"\u2060[1]", false},
	{`{`, false}, {`}`, false}, {`{"a"`, false}, {`{"a":`, false}, {`{"a":1`, false}, {`{"a":1,`, false}, {`{"a":1,}`, false}, {`{,"a":1}`, false}, {`{"a":1,,"b":1}`, false}, {`{"a" 1}`, false}, {`{"a"=1}`, false}, {`{"a"}`, false}, {`{a:1}`, false}, {`{'a':1}`, false}, {`{1:1}`, false}, {`{null:1}`, false}, {`{[]:1}`, false}, {`{"a":1 "b":1}`, false}, {`{"a":1]`, false}, {`{"a":1}}`, false}, {`{"a"::1}`, false}, {`{:1}`, false}, {`{"a":1;"b":1}`, false}, {`{"a":1}{}`, false}, {`{"a":a}`, false},
	{`{"a":1,"a":1}`, false}, {`{"a":1,"a":2}`, false}, {`{"a":1,"\u0061":2}`, false}, {`{"a":1,"A":2}`, false}, {`{"":1,"":2}`, false}, {`{"s":1,"\u017f":2}`, false}, {`{"k":1,"\u212a":2}`, false}, {"{\"s\":1,\"\u017f\":2}", false}, {`{"\u03c3":1,"\u03c2":2}`, false}, {`{"b":{"a":1,"a":2}}`, false}, {`[{"a":1,"a":2}]`, false}, {`{"a":1,"b":2,"a":3}`, false},
	{strings.Repeat("[", 16) + strings.Repeat("]", 16), false}, {strings.Repeat("[", 10000) + strings.Repeat("]", 10000), false}, {strings.Repeat(`{"a":`, 16) + "0" + strings.Repeat("}", 16), false}, {strings.Repeat("[", 100), false}, {strings.Repeat(`{"a":`, 1000), false}, {strings.Repeat("[{", 9) + strings.Repeat("}]", 9), false},
}

// manifests returns hostile manifests, and some that are good.
func manifests() (all []sample) {
	count := map[string]int{}
	add := func(class, text, want string) {
		count[class]++
		name := fmt.Sprint(class, " ", count[class])
		all = append(all, sample{Name: name, Class: class, raw: []byte(text), want: []string{want}})
	}
	sum := sum256("AAA")
	part := func(members string) string { return `{"parts":{"a":{` + members + `}}}` }
	good := `"src":"a.bin","size":3,"cs_sha256":"` + sum + `"`
	top := func(members string) string { return `{` + members + `"parts":{"a":{` + good + `}}}` }
	without := func(member, instead string) string {
		return part(strings.Replace(good, map[string]string{"src": `"src":"a.bin",`, "size": `"size":3,`, "sum": `"cs_sha256":"` + sum + `"`}[member], instead, 1))
	}

	// JSON itself, as a member, as the value of a part's member, and alone.
	for _, j := range jsonTexts {
		want := "ErrManifest"
		if j.ok {
			want = ""
		}
		add("json", `{"parts":{"a":{`+good+`}},"x":`+j.text+`}`, want)
	}
	for _, s := range []string{``, ` `, `null`, `0`, `""`, `[]`, `true`, `{}`, `{"a":1}`, `{"parts":{}}`, `{"parts":null}`, `{"parts":[]}`, `{"parts":0}`, `{"parts":""}`, `{"parts":{"a":null}}`, `{"parts":{"a":[]}}`, `{"parts":{"a":0}}`, `{"parts":{"a":{}}}`, `{"Parts":{"a":{` + good + `}}}`, `{"parts":{"":{` + good + `}}}`} {
		add("shape", s, "ErrManifest")
	}
	for _, s := range []string{"\ufeff" + part(good), part(good) + "x", part(good) + "{}", part(good) + "\x00", part(good) + ",", "\x00" + part(good), part(good)[:len(part(good))-1], part(good) + part(good), "[" + part(good) + "]", "PK\x03\x04" + part(good), "<?xml version='1.0'?>", strings.ReplaceAll(part(good), "", "\x00")} {
		add("around", s, "ErrManifest")
	}
	for _, s := range []string{part(good), " \t\r\n" + part(good) + " \t\r\n", part(good + `,"type":"app"`), part(good + `,"cs_sha1":"` + sum1("AAA") + `"`), part(good + `,"x":{"y":[1]}`), part(good + `,"update":false`), part(good + `,"update":true`), part(good + `,"addr":4096,"ptn":"app_0","encrypt":true`), part(`"fill":0,"size":5`), part(`"fill":255,"size":16777216`),
		top(`"name":"","platform":"p","version":"\u0000",`), top(`"ota":{},`), top(`"ota":{"security":0},`), top(`"ota":{"security":9007199254740991},`), top(`"ota":{"security":1,"x-y":2},`), top(`"description":"` + strings.Repeat("x", 30000) + `",`)} {
		add("good", s, "")
	}

	storage(add)

	// Two that differ for one parser and not for another.
	for _, m := range []string{"name", "platform", "version", "build_id", "build_timestamp", "description"} {
		add("duplicate", top(fmt.Sprintf(`%q:"a",%q:"a",`, m, m)), "ErrManifest")
		add("case", top(fmt.Sprintf(`%q:"a",`, strings.ToUpper(m))), "ErrManifest")
		add("case", top(fmt.Sprintf(`%q:"a",%q:"b",`, m, strings.ToUpper(m[:1])+m[1:])), "ErrManifest")
		for _, v := range []string{"null", "1", "true", "[]", "{}", `["a"]`} {
			add("type", top(fmt.Sprintf(`%q:%s,`, m, v)), "ErrManifest")
		}
	}
	for _, m := range []string{"src", "size", "cs_sha256", "cs_sha1", "fill", "type", "update"} {
		add("duplicate", part(good+fmt.Sprintf(`,%q:1,%q:1`, m, m)), "ErrManifest")
		add("case", part(good+fmt.Sprintf(`,%q:1`, strings.ToUpper(m))), "ErrManifest")
		for _, v := range []string{"null", "[]", "{}", "-1", `"x"`} {
			if strings.Contains("src type", m) && v == `"x"` {
				continue
			}
			want := "ErrManifest"
			if strings.HasPrefix(m, "cs_") && v == `"x"` {
				want = "ErrNoDigest"
			}
			add("type", part(fmt.Sprintf(`"addr":0,%q:%s`, m, v)), want)
		}
	}
	for _, s := range []string{`"\u017frc":"b",`, `"\u017fize":4,`, `"c\u017f_\u017fha256":"x",`, `"s\u0131ze":3,"\u0053ize":3,`, `"src\u0000":"b","SRC":"c",`, `"fi\u006cl":0,`} {
		add("case", part(s+good), "ErrManifest")
	}
	add("case", `{"part\u017f":{},"parts":{"a":{`+good+`}}}`, "ErrManifest")
	add("case", `{"o\u0074a":{"security":1},"OTA":{"security":2},"parts":{"a":{`+good+`}}}`, "ErrManifest")
	add("duplicate", `{"parts":{"a":{`+good+`}},"parts":{"b":{`+good+`}}}`, "ErrManifest")
	for _, names := range [][2]string{{"a", "a"}, {"a", "A"}, {"a", `\u0061`}, {"k", `\u212a`}} {
		add("duplicate", fmt.Sprintf(`{"parts":{"%s":{%s},"%s":{%s}}}`, names[0], good, names[1], strings.Replace(good, "a.bin", "b.bin", 1)), "ErrManifest")
	}
	for _, src := range []string{"a.bin", "A.BIN", `\u0061.bin`} {
		add("duplicate", fmt.Sprintf(`{"parts":{"a":{%s},"b":{%s}}}`, good, strings.Replace(good, "a.bin", src, 1)), "ErrManifest")
	}
	add("duplicate", strings.Replace(part(good), "a.bin", "manifest.json", 1), "ErrManifest")
	add("duplicate", strings.Replace(part(good), "a.bin", "Manifest.JSON", 1), "ErrManifest")

	// Numbers.
	for _, n := range []string{"0", "-0", "-1", "3.0", "3.5", "3e0", "0.3e1", "3E0", "03", "0x3", `"3"`, "true", "1e400", "9007199254740992", "18446744073709551615", "18446744073709551616", "18446744073709551619", "99999999999999999999999999", "-9223372036854775808", "NaN", "Infinity", "+3", "3 4", ""} {
		add("number", without("size", `"size":`+n+`,`), "ErrManifest")
		add("number", top(`"ota":{"security":`+n+`},`), map[bool]string{true: "", false: "ErrManifest"}[n == "0"])
		add("number", part(`"size":3,"fill":`+n), map[bool]string{true: "", false: "ErrManifest"}[n == "0"])
	}
	for _, n := range []string{"4294967295", "4294967296", "4294967299", "9007199254740991"} {
		add("number", without("size", `"size":`+n+`,`), "ErrTooLarge")
		add("number", part(`"fill":0,"size":`+n), "ErrTooLarge")
	}
	add("number", without("size", `"size":4294967294,`), "")
	add("number", part(`"fill":0,"size":16777217`), "ErrTooLarge")
	for _, n := range []string{"256", "-1", "255.0", `"0"`} {
		add("number", part(`"size":1,"fill":`+n), "ErrManifest")
	}
	for _, m := range []string{"addr", "addr1", "fs_size", "fs_block_size", "fs_erase_size", "fs_page_size"} {
		for _, v := range []string{"-1", "1.5", `"1"`, "9007199254740992"} {
			add("number", part(good+fmt.Sprintf(`,%q:%s`, m, v)), "ErrManifest")
		}
	}

	// Digests.
	for _, d := range []string{"", "0", sum[:63], sum + "0", sum[:40], sum + sum, " " + sum[1:], sum[:63] + " ", sum[:63] + "g", sum[:62] + `\n0`, "0x" + sum[2:], "sha256:" + sum[7:], strings.Repeat(`\u0030`, 63), sum[:63] + `\u00b2`, strings.Repeat("z", 64), "-" + sum[1:], strings.Repeat("\uff10", 64), strings.Repeat(" ", 64)} {
		add("digest", without("sum", `"cs_sha256":"`+d+`"`), "ErrNoDigest")
		if len(d) != 40 {
			add("digest", part(good+`,"cs_sha1":"`+d+`"`), "ErrNoDigest")
		}
	}
	add("digest", without("sum", `"cs_sha256":"`+strings.ToUpper(sum)+`"`), "")
	add("digest", without("sum", `"cs_sha256":"`+strings.Repeat(`\u0030`, 64)+`"`), "")
	for _, m := range []string{"cs_sha512", "cs_md5", "cs_crc32", "cs_SHA256"} {
		want := map[bool]string{true: "ErrManifest", false: ""}[m == "cs_SHA256"] // unknown ones count for nothing
		add("digest", without("sum", `"`+m+`":"`+sum+`"`), want)
	}

	// What does not go together.
	add("part", without("size", ""), "ErrManifest")
	add("part", without("src", ""), "ErrManifest")
	add("part", part(good+`,"fill":0`), "ErrManifest")
	add("part", without("src", `"src":"",`), "ErrManifest")
	add("part", part(good+`,"update":"false"`), "ErrManifest")
	add("part", part(good+`,"encrypt":1`), "ErrManifest")
	for _, s := range []string{"../a", "a/b", "/a", "a\\\\b", "..", ".", "a b", "a\\u0000", "\\u00fc", "a\\n", strings.Repeat("x", 50)} {
		add("part", without("src", `"src":"`+s+`",`), "ErrName")
		add("part", fmt.Sprintf(`{"parts":{"%s":{%s}}}`, s, good), "ErrManifest")
	}
	add("part", `{"parts":{`+numbered(65, `"p%d":{"fill":0,"size":1}`)+`}}`, "ErrManifest")
	add("part", `{"parts":{`+numbered(64, `"p%d":{"fill":0,"size":1}`)+`}}`, "")
	add("part", `{"parts":{`+numbered(17, `"p%d":{"fill":0,"size":1048576}`)+`}}`, "ErrTooLarge")
	for _, v := range []string{`[]`, `null`, `"x"`, `{"security":1,"security":1}`, `{"Security":1}`, `{"\u017fecurity":1}`} {
		add("part", top(`"ota":`+v+`,`), "ErrManifest")
	}

	// Huge.
	add("huge", `{`+strings.Repeat(`"a":0,`, 5000)+`"parts":{}}`, "ErrManifest")
	add("huge", `{`+numbered(4100, `"m%d":0`)+`,"parts":{"a":{`+good+`}}}`, "ErrManifest")
	add("huge", `{`+numbered(4000, `"m%d":0`)+`,"parts":{"a":{`+good+`}}}`, "")
	add("huge", `{"parts":{"`+strings.Repeat("x", 60000)+`":{`+good+`}}}`, "ErrManifest")
	add("huge", top(`"`+strings.Repeat(`\u0061`, 10000)+`":0,`), "")
	add("huge", `{"x":"`+strings.Repeat(`\ud800`, 10000)+`"}`, "ErrManifest")
	add("huge", top(`"x":`+strings.Repeat("9", 60000)+`,`), "")
	add("huge", top(`"x":1e`+strings.Repeat("9", 60000)+`,`), "")
	return all
}

func TestCorpusManifests(t *testing.T) {
	all := corpus(t, "manifests.json", manifests(), func(b []byte) error {
		_, err := bundle.ParseManifest(b)
		return err
	})
	count := map[string]int{}
	for _, s := range all {
		count[s.Error]++
	}
	t.Logf("%d manifests: %v", len(all), count)
	require.GreaterOrEqual(t, len(all), 400)
}

// corpusKey returns a private key that anybody can make.
func corpusKey(t testing.TB, seed string) *ecdsa.PrivateKey {
	sum := sha256.Sum256([]byte(seed))
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), sum[:])
	require.NoError(t, err)
	return k
}

// signatures returns archives whose signatures are wrong in some way, for a
// policy that wants those number 0 and 2.
func signatures(t testing.TB, k0, k1, k2 *ecdsa.PrivateKey) (all []sample) {
	text := small().entries[0].data
	sign := func(k *ecdsa.PrivateKey, h crypto.Hash, text string) []byte {
		d := h.New()
		d.Write([]byte(text))
		sig, err := k.Sign(nil, d.Sum(nil), h) // deterministic, RFC 6979
		require.NoError(t, err)
		return sig
	}
	b64 := base64.StdEncoding.EncodeToString
	der0, der2 := sign(k0, crypto.SHA256, text), sign(k2, crypto.SHA256, text)
	sig0, sig2 := b64(der0), b64(der2)
	field := func(id uint16, body string) string {
		return string(le.AppendUint16(le.AppendUint16(nil, id), uint16(len(body)))) + body
	}
	raw := func(name, extra, want string) {
		a := small()
		a.entries[0].extra = extra
		all = append(all, sample{Name: name, Class: "signature", raw: a.bytes(), want: []string{want}})
	}
	body := func(name, json, want string) { raw(name, field(0x293a, json), want) }
	pair := func(name, s0, want string) { body(name, `{"sig0":"`+s0+`","sig2":"`+sig2+`"}`, want) }
	both := `"sig0":"` + sig0 + `","sig2":"` + sig2 + `"`

	body("both", "{"+both+"}", "")
	body("both and blanks", " {\n"+both+"\t} ", "")
	body("both and attributes", `{"note":{"x":[1]},`+both+"}", "")
	body("escaped name", `{"\u0073ig0":"`+sig0+`","sig2":"`+sig2+`"}`, "")
	body("escaped value", `{"sig0":"\u004d`+sig0[1:]+`","sig2":"`+sig2+`"}`, "")
	raw("no field", "", "ErrUnsigned")
	body("none", "{}", "ErrUnsigned")
	body("first only", `{"sig0":"`+sig0+`"}`, "ErrUnsigned")
	body("second only", `{"sig2":"`+sig2+`"}`, "ErrUnsigned")
	body("of nobody", `{"sig1":"`+b64(sign(k1, crypto.SHA256, text))+`"}`, "ErrUnsigned")
	body("swapped", `{"sig0":"`+sig2+`","sig2":"`+sig0+`"}`, "ErrSignature")
	body("one for both", `{"sig0":"`+sig0+`","sig2":"`+sig0+`"}`, "ErrSignature")
	pair("of another key", b64(sign(k1, crypto.SHA256, text)), "ErrSignature")
	pair("of another manifest", b64(sign(k0, crypto.SHA256, text+" ")), "ErrSignature")
	pair("of the beginning", b64(sign(k0, crypto.SHA256, text[:len(text)-1])), "ErrSignature")
	pair("of nothing", b64(sign(k0, crypto.SHA256, "")), "ErrSignature")
	pair("of the digest", b64(sign(k0, crypto.SHA256, sum256(text))), "ErrSignature")
	pair("of the SHA-384", b64(sign(k0, crypto.SHA384, text)), "ErrSignature")
	sha := sha1.Sum([]byte(text))
	short, err := k0.Sign(nil, sha[:], crypto.SHA1)
	require.NoError(t, err)
	pair("of the SHA-1", b64(short), "ErrSignature")
	for i := range 9 {
		if i != 0 && i != 2 {
			body(fmt.Sprint("as number ", i), fmt.Sprintf(`{"sig%d":"%s","sig2":"%s"}`, i, sig0, sig2), "ErrUnsigned")
		}
	}
	for _, n := range []string{"sig", "sig00", "sig-0", "sig0 ", " sig0", "sig0\\u0000", "sig\\u0660"} {
		body("named "+n, `{"`+n+`":"`+sig0+`","sig2":"`+sig2+`"}`, "ErrUnsigned")
	}
	for _, n := range []string{"Sig0", "SIG0", "\\u017fig0", "\u017fig0", "sIg0"} {
		body("named "+n, `{"`+n+`":"`+sig0+`","sig2":"`+sig2+`"}`, "ErrFormat")
		body("also named "+n, `{"`+n+`":"x",`+both+`}`, "ErrFormat")
	}
	for _, v := range []string{`""`, `null`, `0`, `true`, `[]`, `{}`, `["` + sig0 + `"]`} {
		body("value "+v[:min(len(v), 8)], `{"sig0":`+v+`,"sig2":"`+sig2+`"}`, "ErrSignature")
	}
	for name, s := range map[string]string{
		"without padding": strings.TrimRight(sig0, "=") + "A", "of one letter": "A", "with a blank": sig0[:8] + " " + sig0[8:],
		"twice": sig0 + sig0, "with more": sig0 + "AAAA", "in the URL alphabet": "-_-_", "in hexadecimal": hexOf(der0), "of 1500 letters": strings.Repeat("A", 1500), "of bits that do not count": "AB==",
	} {
		pair("base64 "+name, s, "ErrSignature")
	}
	pair("base64 with a line end", sig0[:8]+`\n`+sig0[8:]+`\r\n`, "") // which package base64 skips
	var rs struct{ R, S *big.Int }
	_, err = asn1.Unmarshal(der0, &rs)
	require.NoError(t, err)
	n := elliptic.P256().Params().N
	der := func(r, s *big.Int) []byte {
		b, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		require.NoError(t, err)
		return b
	}
	zero, one := big.NewInt(0), big.NewInt(1)
	pair("with the other s", b64(der(rs.R, new(big.Int).Sub(n, rs.S))), "") // ECDSA has two
	for name, b := range map[string][]byte{
		"with a byte more": append(bytes.Clone(der0), 0), "cut": der0[:len(der0)-1], "of one byte": {0x30}, "of an empty sequence": {0x30, 0}, "raw": append(rs.R.FillBytes(make([]byte, 32)), rs.S.FillBytes(make([]byte, 32))...),
		"r = 0": der(zero, rs.S), "s = 0": der(rs.R, zero), "both 0": der(zero, zero), "both 1": der(one, one), "r = n": der(n, rs.S), "s = n": der(rs.R, n), "r + n": der(new(big.Int).Add(rs.R, n), rs.S), "s + n": der(rs.R, new(big.Int).Add(rs.S, n)),
		"r negative": der(new(big.Int).Neg(rs.R), rs.S), "s negative": der(rs.R, new(big.Int).Neg(rs.S)), "swapped": der(rs.S, rs.R), "of 1000 bits": der(new(big.Int).Lsh(rs.R, 1000), rs.S),
		"long form": append([]byte{0x30, 0x81, der0[1]}, der0[2:]...), "indefinite": append(append([]byte{0x30, 0x80}, der0[2:]...), 0, 0), "a set": append([]byte{0x31}, der0[1:]...), "three numbers": append([]byte{0x30, der0[1] + 3}, append(bytes.Clone(der0[2:]), 2, 1, 1)...),
	} {
		pair("DER "+name, b64(b), "ErrSignature")
	}
	body("twice the same", `{"sig0":"`+sig0+`",`+both+`}`, "ErrFormat")
	body("twice, first bad", `{"sig0":"x",`+both+`}`, "ErrFormat")
	body("twice, escaped", `{"\u0073ig0":"x",`+both+`}`, "ErrFormat")
	for i, s := range []string{"", " ", "[]", "null", "{", "{]", "{" + both, "{" + both + "}x", "{" + both + "}{}", "{" + both + ",}", "\ufeff{" + both + "}", "{" + both + "}\x00", "{" + both + ",\"\xff\":0}", "{" + both + `,"x":"\ud800"}`, "{" + both + `,"a":` + strings.Repeat("[", 16) + strings.Repeat("]", 16) + "}", "{" + strings.Repeat(`"a":`, 300)} {
		body(fmt.Sprintf("JSON %d %.10q", i, s), s, "ErrFormat")
	}
	full := "{" + both + "}"
	raw("in another field", field(0x293b, full), "ErrFormat")
	raw("after another field", field(0x5455, "x")+field(0x293a, full), "ErrFormat")
	raw("before another field", field(0x293a, full)+field(0x5455, "x"), "ErrFormat")
	raw("two fields", field(0x293a, full)+field(0x293a, full), "ErrFormat")
	raw("field cut", field(0x293a, full)[:100], "ErrFormat")
	raw("field of 3 bytes", "\x3a\x29\x00", "ErrFormat")
	raw("field too long", field(0x293a, "{"+both+strings.Repeat(" ", 2000)+"}"), "ErrHeaderTooLong")

	// The manifest or the files changed afterwards.
	change := func(name string, do func(a *archive), want string) {
		a := small()
		a.entries[0].extra = field(0x293a, full)
		do(a)
		all = append(all, sample{Name: name, Class: "signature", raw: a.bytes(), want: []string{want}})
	}
	change("manifest with a blank", func(a *archive) { a.entries[0].data += " " }, "ErrSignature")
	change("manifest replaced", func(a *archive) { a.entries[0].data = manifestOf("a.bin", "AAA", "b.bin", "XX") }, "ErrSignature")
	change("manifest not JSON", func(a *archive) { a.entries[0].data = "garbage" }, "ErrSignature")
	change("file replaced", func(a *archive) { a.entries[1].data = "XXX" }, "ErrDigest")
	change("files exchanged", func(a *archive) { a.entries[1].name, a.entries[2].name = "b.bin", "a.bin" }, "ErrSize")
	change("file added", func(a *archive) { a.entries = append(a.entries, entry{name: "c", data: "c"}) }, "ErrExtraEntry")
	change("file left out", func(a *archive) { a.entries = a.entries[:2] }, "ErrMissing")
	change("field of a file", func(a *archive) { a.entries[1].extra = field(0x293a, full) }, "ErrFormat")
	change("directory without the field", func(a *archive) {
		a.entries[0].dir = func(c []byte) []byte {
			put16(30, 0)(c)
			return c[:len(c)-len(a.entries[0].extra)]
		}
	}, "ErrMismatch")
	return all
}

func TestCorpusSignatures(t *testing.T) {
	k0, k1, k2 := corpusKey(t, "number 0"), corpusKey(t, "number 1"), corpusKey(t, "number 2")
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k0.PublicKey, nil, &k2.PublicKey}}
	all := corpus(t, "signatures.json", sortedByName(signatures(t, k0, k1, k2)), func(b []byte) error {
		_, err := p.Verify(context.Background(), bytes.NewReader(b))
		return err
	})
	t.Logf("%d signatures", len(all))
	require.GreaterOrEqual(t, len(all), 100)
	for _, s := range all {
		// Allowing unsigned bundles does not let a wrong signature pass.
		if s.Error == "ErrSignature" {
			q := *p
			q.AllowUnsigned = true
			_, err := q.Verify(context.Background(), bytes.NewReader(s.raw))
			require.ErrorIs(t, err, bundle.ErrSignature, s.Name)
		}
	}
}

// A bundle whose extra field is anything at all passes only if the lenient parser
// finds the same two signatures there, and they are right.
func FuzzSignatures(f *testing.F) {
	k0, k1, k2 := corpusKey(f, "number 0"), corpusKey(f, "number 1"), corpusKey(f, "number 2")
	for _, s := range signatures(f, k0, k1, k2) {
		n := 30 + len("manifest.json")
		f.Add(s.raw[n : n+int(le.Uint16(s.raw[28:]))])
	}
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k0.PublicKey, nil, &k2.PublicKey}}
	sum := sha256.Sum256([]byte(small().entries[0].data))
	f.Fuzz(func(t *testing.T, extra []byte) {
		if len(extra) > 3000 {
			return
		}
		a := small()
		a.entries[0].extra = string(extra)
		b, err := p.Verify(context.Background(), bytes.NewReader(a.bytes()))
		if err != nil {
			require.Less(t, len(err.Error()), 400)
			return
		}
		require.Len(t, b.Info().SignedBy, 2)
		var lenient struct{ Sig0, Sig2 []byte }
		require.NoError(t, json.Unmarshal(extra[4:], &lenient))
		require.True(t, ecdsa.VerifyASN1(&k0.PublicKey, sum[:], lenient.Sig0))
		require.True(t, ecdsa.VerifyASN1(&k2.PublicKey, sum[:], lenient.Sig2))
		sameAsStandardLibrary(t, a.bytes())
	})
}

func FuzzKey(f *testing.F) {
	f.Add(load(f, "k0.pub.pem"))
	f.Add(load(f, "k2.pub.pem"))
	der := corpusKey(f, "number 0").PublicKey
	spki, err := x509.MarshalPKIXPublicKey(&der)
	require.NoError(f, err)
	f.Add([]byte(base64.StdEncoding.EncodeToString(spki)))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := bundle.ParseKey(b)
		if err != nil {
			require.ErrorIs(t, err, ota.ErrInvalid)
			return
		}
		// The standard library knows the same key, and its form is accepted.
		spki, err := x509.MarshalPKIXPublicKey(k)
		require.NoError(t, err)
		again, err := bundle.ParseKey([]byte(base64.StdEncoding.EncodeToString(spki)))
		require.NoError(t, err)
		require.True(t, k.Equal(again))
		id, err := bundle.KeyID(k)
		require.NoError(t, err)
		require.Equal(t, sum256(string(spki)), id)
	})
}

// storage is about what the member "ota" says of parts.
func storage(add func(class, text, want string)) {
	sum := sum256("AAA")
	doc := func(own, size string) string {
		return `{"parts":{"a":{"src":"a.bin","size":` + size + `,"cs_sha256":"` + sum + `"},"f":{"fill":0,"size":5},"i":{"src":"i","size":%d,"cs_sha256":"` + sum +
			`","update":false}},"ota":{` + own + `}}`
	}
	try := func(own, size string, index int, want string) {
		add("storage", fmt.Sprintf(doc(own, size), index), want)
	}
	part := func(s string) string { return `"format":1,"index":"i","parts":{"a":{` + s + `}}` }
	plain := func(s string) string { return `"format":1,"parts":{"a":{` + s + `}}` }
	section := `,"section_sha256":"` + sum + `"`
	stored := `,"stored_size":2000,"stored_sha256":"` + sum + `"`
	zstd := `"encoding":"zstd"` + stored + `,"window":1024,"frame":1024` + section
	chunks := `"chunk":512` + section

	try(part(chunks), "3", 16+32, "")
	try(part(chunks), "512", 16+32, "")
	try(part(chunks), "513", 16+64, "")
	try(part(zstd), "1024", 16+36, "")
	try(part(zstd+`,"chunk":512`), "1025", 16+2*36+3*32, "")
	try(part(zstd+`,"x-more":[1]`), "1024", 16+36, "")
	try(part(zstd)+`,"x-more":{}`, "1024", 16+36, "")
	try(part(zstd), "1099511627", 16+36*1073742, "")
	try(plain(`"encoding":"deflate"`+stored), "5", 5, "")
	try(plain(``), "5", 5, "")
	try(`"format":1`, "5", 5, "")

	for _, n := range []int{1, 16, 16 + 36 - 1, 16 + 36 + 1} {
		try(part(zstd), "1024", n, "ErrIndex")
	}
	for _, f := range []string{"2", "9007199254740991"} {
		try(strings.Replace(part(zstd), `"format":1`, `"format":`+f, 1), "1024", 16+36, "ErrUnsupported")
	}
	for _, f := range []string{"0", "1.0", `"1"`, "null", "true"} {
		try(strings.Replace(part(zstd), `"format":1`, `"format":`+f, 1), "1024", 16+36, map[bool]string{true: "ErrUnsupported", false: "ErrManifest"}[f == "0"])
	}
	for _, own := range []string{part(zstd) + `,"more":1`, part(zstd + `,"more":1`), part(strings.Replace(zstd, "zstd", "xz", 1)), part(strings.Replace(zstd, "zstd", "", 1)),
		part(strings.Replace(zstd, "zstd", "none", 1)), part(zstd + `,"base":"old"`), `"format":1,"X-a":1`} {
		try(own, "1024", 16+36, "ErrUnsupported")
	}
	for _, own := range []string{
		`"index":"i","parts":{"a":{` + zstd + `}}`,
		`"format":1,"parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":"","parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":"j","parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":"a","parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":"f","parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":1,"parts":{"a":{` + zstd + `}}`,
		`"format":1,"index":"i","parts":[]`,
		`"format":1,"index":"i","parts":{"a":1}`,
		`"format":1,"index":"i","parts":{"b":{` + zstd + `}}`,
		`"format":1,"index":"i","parts":{"A":{` + zstd + `}}`,
		`"format":1,"index":"i","parts":{"i":{` + zstd + `}}`,
		`"format":1,"index":"i","parts":{"f":{` + zstd + `}}`,
		`"format":1,"index":"i"`,
		`"format":1,"index":"i","parts":{}`,
		`"format":1,"INDEX":"i"`,
		part(strings.Replace(zstd, `"frame":1024`, `"frame":0`, 1)),
		part(strings.Replace(zstd, `"frame":1024`, `"frame":1000`, 1)),
		part(strings.Replace(zstd, `"frame":1024`, `"frame":-1`, 1)),
		part(strings.Replace(zstd, `"frame":1024`, `"frame":67109376`, 1)),
		part(strings.Replace(zstd, `"frame":1024,`, ``, 1)),
		part(strings.Replace(zstd, `"window":1024,`, ``, 1)),
		part(strings.Replace(zstd, `"window":1024`, `"window":1023`, 1)),
		part(strings.Replace(zstd, `"window":1024`, `"window":2048`, 1)),
		part(strings.Replace(zstd, `"window":1024`, `"window":9007199254740991`, 1)),
		part(strings.Replace(zstd, `"stored_size":2000`, `"stored_size":0`, 1)),
		part(strings.Replace(zstd, `"stored_size":2000`, `"stored_size":4294967295`, 1)),
		part(strings.Replace(zstd, `"stored_size":2000,`, ``, 1)),
		part(strings.Replace(zstd, section, ``, 1)),
		part(zstd + `,"chunk":0`),
		part(zstd + `,"chunk":500`),
		part(zstd + `,"chunk":1536`),
		part(zstd + `,"chunk":2048`),
		part(zstd + `,"Chunk":512`),
		part(zstd + `,"chunk":"512"`),
		part(`"chunk":512`),
		part(section[1:]),
		part(chunks + stored),
		part(`"encoding":"deflate"` + stored + `,"frame":1024,"window":1024`),
		part(`"encoding":"deflate"` + stored + section),
		part(`"encoding":"deflate"`),
		part(`"encoding":1`),
	} {
		try(own, "1024", 16+36, "ErrManifest")
	}
	try(part(strings.Replace(zstd, sum, sum[1:], 1)), "1024", 16+36, "ErrNoDigest")
	try(part(strings.Replace(zstd, section, `,"section_sha256":""`, 1)), "1024", 16+36, "ErrNoDigest")
	try(part(zstd), "1099511627777", 16+36, "ErrTooLarge")
	try(part(zstd), "1099511627776", 16+36, "ErrTooLarge")
	try(part(chunks), "4294967295", 16+36, "ErrTooLarge")
	try(part(chunks), "4294967294", 16+36, "ErrTooLarge") // 256 MiB of digests
}
