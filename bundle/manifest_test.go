package bundle_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

func TestManifestStrict(t *testing.T) {
	const d1, d256 = "be709294103ecb4e32ff8c2b29998e82616855c8", "45786528e7cd670b64ba55eaa8b1b8ac4aa119c0b0d660da2b1212325df1df37"
	const ok = `"parts":{"a":{"src":"a.bin","size":1,"cs_sha256":"` + d256 + `"}}`
	part := func(s string) string { return `{"parts":{"a":{"src":"a.bin","size":1,` + s + `}}}` }
	tooMany := make([]string, 65)
	for i := range tooMany {
		tooMany[i] = fmt.Sprintf(`"p%d":{"size":1,"fill":0}`, i)
	}
	for text, want := range map[string]error{
		`{` + ok + `}`:                                      nil,
		" \r\n\t{" + ok + "}\n":                             nil,
		`{` + ok + `,"x":null,"y":[{}],"z":1e400}`:          nil,
		`{` + ok + `,"ota":{"security":9007199254740991}}`:  nil,
		part(`"cs_sha256":"` + strings.ToUpper(d256) + `"`): nil,
		part(`"encrypt":true,"flash":false,"addr":0,"addr1":4294967295,"ptn":"x","falloc":"?","sign":[]`): nil,
		`{"parts":{"a":{"size":1,"fill":255}}}`:                                                           nil,

		``:                                   bundle.ErrManifest,
		`null`:                               bundle.ErrManifest,
		`[]`:                                 bundle.ErrManifest,
		`"x"`:                                bundle.ErrManifest,
		`{`:                                  bundle.ErrManifest,
		`{}`:                                 bundle.ErrManifest,
		`{"parts":{}}`:                       bundle.ErrManifest,
		`{"parts":null}`:                     bundle.ErrManifest,
		`{"parts":[]}`:                       bundle.ErrManifest,
		`{"parts":{"a":null}}`:               bundle.ErrManifest,
		`{"parts":{"a":{}}}`:                 bundle.ErrManifest,
		`{` + ok + `,}`:                      bundle.ErrManifest,
		`{` + ok + `}{}`:                     bundle.ErrManifest,
		`{` + ok + `}x`:                      bundle.ErrManifest,
		`{` + ok + "}\x00":                   bundle.ErrManifest,
		"\xef\xbb\xbf{" + ok + `}`:           bundle.ErrManifest, // byte order mark
		`{` + ok + `,` + ok + `}`:            bundle.ErrManifest,
		`{` + ok + `,"Parts":{}}`:            bundle.ErrManifest,
		`{` + ok + `,"name":"a","name":"a"}`: bundle.ErrManifest,
		`{` + ok + `,"Name":"a"}`:            bundle.ErrManifest,
		`{` + ok + `,"ver\u017fion":"1"}`:    bundle.ErrManifest,
		`{` + ok + `,"\u006eame":"a","name":"a"}`:                                    bundle.ErrManifest,
		`{` + ok + `,"x":1,"X":2}`:                                                   bundle.ErrManifest,
		`{` + ok + `,"x":{"y":[{"z":1,"z":1}]}}`:                                     bundle.ErrManifest,
		`{` + ok + `,"name":null}`:                                                   bundle.ErrManifest,
		`{` + ok + `,"version":1.0}`:                                                 bundle.ErrManifest,
		`{` + ok + `,"platform":["esp32"]}`:                                          bundle.ErrManifest,
		`{` + ok + `,"build_id":{}}`:                                                 bundle.ErrManifest,
		`{` + ok + `,"name":"` + "\xff" + `"}`:                                       bundle.ErrManifest,
		`{` + ok + `,"name":"\ud800"}`:                                               bundle.ErrManifest,
		`{` + ok + `,"name":"` + "\n" + `"}`:                                         bundle.ErrManifest,
		`{` + ok + `,"x":` + strings.Repeat("[", 16) + strings.Repeat("]", 16) + `}`: bundle.ErrManifest,
		`{` + ok + `,"x":` + strings.Repeat("[", 15) + strings.Repeat("]", 15) + `}`: nil,
		`{` + ok + `,"ota":1}`:                                                       bundle.ErrManifest,
		`{` + ok + `,"OTA":{}}`:                                                      bundle.ErrManifest,
		`{` + ok + `,"ota":{"security":-1}}`:                                         bundle.ErrManifest,
		`{` + ok + `,"ota":{"security":"1"}}`:                                        bundle.ErrManifest,
		`{` + ok + `,"ota":{"Security":1}}`:                                          bundle.ErrManifest,
		`{` + ok + `,"ota":{"security":9007199254740992}}`:                           bundle.ErrManifest,
		`{` + ok + `,"ota":{"security":18446744073709551616}}`:                       bundle.ErrManifest,
		`{"parts":{` + strings.Join(tooMany, ",") + `}}`:                             bundle.ErrManifest,
		`{"parts":{` + strings.Join(tooMany[1:], ",") + `}}`:                         nil,
		`{"parts":{"a":{"size":1,"fill":0},"A":{"size":1,"fill":0}}}`:                bundle.ErrManifest,
		`{"parts":{"":{"size":1,"fill":0}}}`:                                         bundle.ErrManifest,
		`{"parts":{"a/b":{"size":1,"fill":0}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":1}}}`:                                                 bundle.ErrManifest,
		`{"parts":{"a":{"fill":1}}}`:                                                 bundle.ErrManifest,
		`{"parts":{"a":{"size":0,"fill":1}}}`:                                        bundle.ErrManifest,
		`{"parts":{"a":{"size":-1,"fill":1}}}`:                                       bundle.ErrManifest,
		`{"parts":{"a":{"size":1.0,"fill":1}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":1e0,"fill":1}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":"1","fill":1}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":18446744073709551617,"fill":1}}}`:                     bundle.ErrManifest,
		`{"parts":{"a":{"size":9223372036854775808,"fill":1}}}`:                      bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"fill":256}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"fill":null}}}`:                                     bundle.ErrManifest,
		`{"parts":{"a":{"size":16777217,"fill":1}}}`:                                 bundle.ErrTooLarge,
		`{"parts":{"a":{"size":16777216,"fill":1}}}`:                                 nil,
		`{"parts":{"a":{"size":16777216,"fill":1},"b":{"size":1,"fill":1}}}`:         bundle.ErrTooLarge,
		`{"parts":{"a":{"size":4294967295,"src":"x"}}}`:                              bundle.ErrTooLarge,
		`{"parts":{"a":{"size":1,"src":""}}}`:                                        bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"src":"","fill":0}}}`:                               bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"src":null}}}`:                                      bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"src":"../x"}}}`:                                    bundle.ErrName,
		`{"parts":{"a":{"size":1,"src":"x/y"}}}`:                                     bundle.ErrName,
		`{"parts":{"a":{"size":1,"src":"Manifest.json"}}}`:                           bundle.ErrManifest,
		`{"parts":{"a":{"size":1,"src":"x"},"b":{"size":1,"src":"X"}}}`:              bundle.ErrManifest,
		part(`"fill":0`):                        bundle.ErrManifest,
		part(`"size":1`):                        bundle.ErrManifest,
		part(`"Size":1`):                        bundle.ErrManifest,
		part(`"CS_SHA256":"` + d256 + `"`):      bundle.ErrManifest,
		part(`"update":0`):                      bundle.ErrManifest,
		part(`"Update":false`):                  bundle.ErrManifest,
		part(`"encrypt":"true"`):                bundle.ErrManifest,
		part(`"ptn":1`):                         bundle.ErrManifest,
		part(`"addr":-1`):                       bundle.ErrManifest,
		part(`"type":true`):                     bundle.ErrManifest,
		part(`"cs_sha256":null`):                bundle.ErrManifest,
		part(`"cs_sha256":""`):                  bundle.ErrNoDigest,
		part(`"cs_sha256":"` + d256[1:] + `"`):  bundle.ErrNoDigest,
		part(`"cs_sha256":"` + d256 + `0"`):     bundle.ErrNoDigest,
		part(`"cs_sha256":" ` + d256 + `"`):     bundle.ErrNoDigest,
		part(`"cs_sha256":"g` + d256[1:] + `"`): bundle.ErrNoDigest,
		part(`"cs_sha256":"` + d1 + `"`):        bundle.ErrNoDigest,
		part(`"cs_sha1":"` + d256 + `"`):        bundle.ErrNoDigest,
		part(`"cs_sha1":""`):                    bundle.ErrNoDigest,
	} {
		m, err := bundle.ParseManifest([]byte(text))
		if want == nil {
			require.NoError(t, err, text)
			require.Equal(t, text, string(m.Raw()))
			continue
		}
		require.ErrorIs(t, err, want, text)
		require.Nil(t, m, text)
		var e *bundle.Error
		require.ErrorAs(t, err, &e)
		require.Less(t, len(err.Error()), 300)
		require.NotContains(t, err.Error(), "\n")
	}
}

// Which digests are enough, and that all of them count.
func TestDigests(t *testing.T) {
	for name, c := range map[string]struct {
		members string
		p       *bundle.Policy
		err     error
	}{
		"both":                  {`"cs_sha1":"` + sum1(appData) + `","cs_sha256":"` + sum256(appData) + `"`, lax, nil},
		"upper case":            {`"cs_sha1":"` + strings.ToUpper(sum1(appData)) + `","cs_sha256":"` + strings.ToUpper(sum256(appData)) + `"`, lax, nil},
		"SHA-256":               {`"cs_sha256":"` + sum256(appData) + `"`, lax, nil},
		"SHA-256 wrong":         {`"cs_sha256":"` + sum256(fsData) + `"`, old, ota.ErrDigest},
		"SHA-1":                 {`"cs_sha1":"` + sum1(appData) + `"`, lax, bundle.ErrNoDigest},
		"SHA-1 allowed":         {`"cs_sha1":"` + sum1(appData) + `"`, old, nil},
		"SHA-1 allowed wrong":   {`"cs_sha1":"` + sum1(fsData) + `"`, old, bundle.ErrDigest},
		"none":                  {`"type":"app"`, old, bundle.ErrNoDigest},
		"SHA-1 wrong of both":   {`"cs_sha1":"` + sum1(fsData) + `","cs_sha256":"` + sum256(appData) + `"`, old, bundle.ErrDigest},
		"SHA-256 wrong of both": {`"cs_sha1":"` + sum1(appData) + `","cs_sha256":"` + sum256(fsData) + `"`, old, ota.ErrDigest},
	} {
		m := fmt.Sprintf(`{"parts":{"app":{"src":"app.bin","size":%d,%s}}}`, len(appData), c.members)
		a := &archive{entries: []entry{{name: "manifest.json", data: m}, {name: "app.bin", data: appData}}}
		_, _, err := content(t.Context(), c.p, strings.NewReader(string(a.bytes())))
		_, verr := c.p.Verify(t.Context(), strings.NewReader(string(a.bytes())))
		if c.err == nil {
			require.NoError(t, err, name)
			require.NoError(t, verr, name)
			continue
		}
		require.ErrorIs(t, err, c.err, name)
		require.ErrorIs(t, verr, c.err, name)
	}

	// Constant content is known before it is made.
	for digest, want := range map[string]error{sum256("\xff\xff"): nil, sum256("\xff"): bundle.ErrDigest} {
		m := `{"parts":{"nvs":{"size":2,"fill":255,"cs_sha256":"` + digest + `"}}}`
		a := &archive{entries: []entry{{name: "manifest.json", data: m}}}
		_, err := lax.Open(t.Context(), strings.NewReader(string(a.bytes())))
		require.ErrorIs(t, err, want)
	}
}

func TestLimits(t *testing.T) {
	open := func(p bundle.Policy) error {
		p.AllowUnsigned = true
		_, err := p.Open(t.Context(), strings.NewReader(string(good().bytes())))
		return err
	}
	size := int64(len(appData) + len(fsData))
	require.NoError(t, open(bundle.Policy{MaxSize: size, MaxManifest: len(plainManifest)}))
	err := open(bundle.Policy{MaxSize: size - 1})
	require.ErrorIs(t, err, bundle.ErrTooLarge)
	require.ErrorIs(t, err, ota.ErrTooLarge)
	require.ErrorIs(t, open(bundle.Policy{MaxManifest: len(plainManifest) - 1}), ota.ErrTooLarge)
}
