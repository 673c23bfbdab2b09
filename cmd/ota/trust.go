package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
)

// keygenNote makes a key pair for notes and trust records, or only the public key of
// one that is kept elsewhere.
func (e *env) keygenNote(out, name, public string) error {
	if name == "" {
		return usagef("need -name NAME: signatures tell it, and every key should have its own")
	}
	if public != "" {
		b, err := readSmall(public)
		if err != nil {
			return err
		}
		k, err := parsePublic(b, name)
		if err != nil {
			return fmt.Errorf("%s: %w", public, err)
		}
		if err := writeNew(out, 0o644, []byte(k.String()+"\n")); err != nil {
			return exists(out, err)
		}
		e.printf("public   %s\nid       %s\n", out, k.ID())
		return nil
	}
	pub := strings.TrimSuffix(out, ".key") + ".pub"
	for _, name := range []string{out, pub} {
		if _, err := os.Lstat(name); err == nil {
			return exists(name, os.ErrExist)
		}
	}
	private, k, err := trust.GenerateKey(rand.Reader, name)
	if err != nil {
		return usagef("%w", err)
	}
	if err := writeNew(out, 0o600, []byte(private+"\n")); err != nil {
		return exists(out, err)
	}
	if err := writeNew(pub, 0o644, []byte(k.String()+"\n")); err != nil {
		return exists(pub, err)
	}
	e.printf("private  %s\npublic   %s\nid       %s\n", out, pub, k.ID())
	e.notef("hint: ota trust init makes the record of the keys that devices trust. Keep a copy of %s in a safe place", out)
	return nil
}

func exists(name string, err error) error {
	if errors.Is(err, os.ErrExist) {
		return fail(exitFailed, "keys are never overwritten; choose another name", "%s exists", name)
	}
	return err
}

// parsePublic reads an Ed25519 public key in PEM form.
func parsePublic(b []byte, name string) (k trust.Key, err error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return k, errors.New("no public key in PEM form")
	}
	any, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return k, err
	}
	pub, ok := any.(ed25519.PublicKey)
	if !ok {
		return k, errors.New("not an Ed25519 key")
	}
	return trust.NewKey(name, pub)
}

// noteKeys reads private keys for notes.
func noteKeys(l list) (keys []*trust.Signer, err error) {
	for _, name := range l {
		b, err := readSmall(name)
		if err != nil {
			return nil, err
		}
		k, err := trust.ParseSigner(strings.TrimSpace(string(b)))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// publicKeys reads public keys for notes.
func publicKeys(l list) (keys []trust.Key, err error) {
	for _, name := range l {
		b, err := readSmall(name)
		if err != nil {
			return nil, err
		}
		k, err := trust.ParseKey(strings.TrimSpace(string(b)))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// readSmall reads a file that should be small.
func readSmall(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, trust.MaxChain+1))
	if err == nil && len(b) > trust.MaxChain {
		err = fmt.Errorf("%s: %w", name, trust.ErrTooLarge)
	}
	return b, err
}

func openTrust(name string) (*trust.Anchor, error) {
	b, err := readSmall(name)
	if err != nil {
		return nil, err
	}
	a, err := trust.Open(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

// hostClock is the clock of this machine, which people keep right.
func hostClock() (time.Time, bool) { return time.Now(), true }

// noteFlags say how a note is to be signed.
type noteFlags struct {
	keys, attach, remove list
	by                   string
	text                 bool
}

func (n *noteFlags) define(fs *flag.FlagSet) {
	fs.Var(&n.keys, "note", "Ed25519 private key, as of ota keygen -type note: `FILE`")
	fs.Var(&n.attach, "attach", "`file` with signatures made elsewhere: a signed note, or lines of one; with -by, the 64 bytes that a module made")
	fs.StringVar(&n.by, "by", "", "public key that the signature to be attached must be by: `FILE`")
	fs.Var(&n.remove, "remove", "remove the signatures of this key first: `name` or id; of a bundle also sig0 to sig7")
	fs.BoolVar(&n.text, "text", false, "print the text to be signed elsewhere, and change nothing")
}

func (n *noteFlags) any() bool { return len(n.keys)+len(n.attach)+len(n.remove) > 0 }

// files are the files that are read.
func (n *noteFlags) files() []string { return slices.Concat(n.keys, n.attach, list{n.by}) }

// lines reads the signatures to be attached to a note of that text.
func (n *noteFlags) lines(text string) (sigs []trust.Signature, err error) {
	var by *trust.Key
	if n.by != "" {
		if len(n.attach) == 0 {
			return nil, usagef("-by goes with -attach")
		}
		k, err := publicKeys(list{n.by})
		if err != nil {
			return nil, err
		}
		by = &k[0]
	}
	for _, name := range n.attach {
		b, err := readSmall(name)
		if err != nil {
			return nil, err
		}
		got, err := attached(b, text, by)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		sigs = append(sigs, got...)
	}
	return sigs, nil
}

func attached(b []byte, text string, by *trust.Key) (sigs []trust.Signature, err error) {
	if by != nil && len(b) == ed25519.SignatureSize {
		sigs = []trust.Signature{{Name: by.Name(), Hash: by.KeyHash(), Sig: b}}
	} else {
		if n, err := trust.ParseNote(b); err == nil {
			if n.Text != text {
				return nil, errors.New("it is a note about something else")
			}
			sigs = n.Signatures
		} else {
			for line := range strings.Lines(string(b)) {
				s, err := trust.ParseSignature(strings.TrimSuffix(line, "\n"))
				if err != nil {
					return nil, err
				}
				sigs = append(sigs, s)
			}
		}
		if len(sigs) == 0 {
			return nil, errors.New("no signature in it")
		}
	}
	if by == nil {
		return sigs, nil
	}
	n := trust.Note{Text: text, Signatures: sigs}
	who, err := n.SignedBy([]trust.Key{*by})
	if err == nil && len(who) == 0 {
		err = fmt.Errorf("none is by %s: %w", by.ID(), trust.ErrUnknownKey)
	}
	return sigs, err
}

// apply changes the signatures of a note.
func (n *noteFlags) apply(note *trust.Note) error {
	for _, name := range n.remove {
		if !note.Remove(name) {
			return fail(exitFailed, "", "no signature of %s to be removed", ota.Quote(name))
		}
	}
	lines, err := n.lines(note.Text)
	if err != nil {
		return err
	}
	keys, err := noteKeys(n.keys)
	if err != nil {
		return err
	}
	note.Add(lines...)
	return note.Sign(keys...)
}

// recordFlags describe a trust record.
type recordFlags struct {
	fs                          *flag.FlagSet
	root, release               list
	rootThreshold, relThreshold int
	step, min                   uint64
	expires, out                string
	sign                        list
}

func (r *recordFlags) define(fs *flag.FlagSet) {
	r.fs = fs
	fs.StringVar(&r.out, "o", "", "`file` to be written")
	fs.Var(&r.root, "root", "public key that may sign trust records: `FILE`")
	fs.Var(&r.release, "release", "public key that may sign bundles: `FILE`")
	fs.IntVar(&r.rootThreshold, "root-threshold", 1, "how many root keys must sign a record: `N`")
	fs.IntVar(&r.relThreshold, "release-threshold", 1, "how many release keys must sign a bundle: `N`")
	fs.Uint64Var(&r.step, "step", 100, "by how much the security version may exceed what a device has committed: `N`")
	fs.Uint64Var(&r.min, "min-security", 0, "lowest acceptable security version: `N`")
	fs.StringVar(&r.expires, "expires", "", "when the record expires: a `time` such as 2030-01-01 or 2030-01-01T12:00:00Z, or never")
	fs.Var(&r.sign, "note", "sign the record with this private key: `FILE`")
}

// fill puts what was given into rec. What was not given stays, if rec is old.
func (r *recordFlags) fill(rec *trust.Record, fresh bool) error {
	given := map[string]bool{}
	r.fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	set := func(name string) bool { return fresh || given[name] }
	var err error
	if set("root") {
		if rec.Root.Keys, err = publicKeys(r.root); err != nil {
			return err
		}
	}
	if set("release") {
		if rec.Release.Keys, err = publicKeys(r.release); err != nil {
			return err
		}
	}
	if set("root-threshold") {
		rec.Root.Threshold = r.rootThreshold
	}
	if set("release-threshold") {
		rec.Release.Threshold = r.relThreshold
	}
	if set("step") {
		rec.SecurityStep = r.step
	}
	if set("min-security") {
		rec.SecurityMin = r.min
	}
	if given["expires"] {
		if rec.Expires, err = parseTime(r.expires); err != nil {
			return err
		}
	}
	return nil
}

func parseTime(s string) (t time.Time, err error) {
	if s == "never" {
		return t, nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err = time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return t, usagef("-expires: %s: need a time such as 2030-01-01 or 2030-01-01T12:00:00Z, or never", ota.Quote(s))
}

// write signs and writes the record, and tells what is still to do.
func (r *recordFlags) write(e *env, rec *trust.Record, old *trust.Record) error {
	text, err := rec.Text()
	if err != nil {
		return usagef("%w", err)
	}
	n := &trust.Note{Text: text}
	if err := (&noteFlags{keys: r.sign}).apply(n); err != nil {
		return err
	}
	if _, err := os.Lstat(r.out); err == nil {
		return fail(exitFailed, "choose another name", "%s exists", r.out)
	}
	if err := e.writeNote(r.out, n); err != nil {
		return err
	}
	return e.printSigners(r.out, n, rec, old)
}

func (e *env) writeNote(name string, n *trust.Note) error {
	return e.writeFile(name, func(w io.Writer) error {
		_, err := w.Write(n.Bytes())
		return err
	})
}

// printSigners tells who has signed a record, and how many are missing.
func (e *env) printSigners(file string, n *trust.Note, rec, old *trust.Record) error {
	if file == "-" {
		return nil
	}
	s, err := signing(n, rec, old)
	if err != nil {
		return err
	}
	e.printf("%s  version %d, signed by %s\n", file, rec.Version, or(strings.Join(s.SignedBy, ", "), "nobody"))
	if s.Missing > 0 {
		e.notef("hint: %d more root keys must sign it: ota trust sign -note KEY %s", s.Missing, file)
	}
	if s.MissingOld > 0 {
		e.notef("hint: %d more root keys of the record before must sign it: ota trust sign -note KEY %s", s.MissingOld, file)
	}
	return nil
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}

// signed tells who has signed a record.
type signed struct {
	SignedBy   []string `json:"signed_by"`
	Missing    int      `json:"missing"`               // root keys
	MissingOld int      `json:"missing_old,omitempty"` // root keys of the record before
}

func signing(n *trust.Note, rec, old *trust.Record) (s signed, err error) {
	s.SignedBy = []string{}
	count := func(r *trust.Role) (int, error) {
		by, err := n.SignedBy(r.Keys)
		for _, k := range by {
			if !slices.Contains(s.SignedBy, k.ID()) {
				s.SignedBy = append(s.SignedBy, k.ID())
			}
		}
		return max(0, r.Threshold-len(by)), err
	}
	if s.Missing, err = count(&rec.Root); err == nil && old != nil {
		s.MissingOld, err = count(&old.Root)
	}
	return s, err
}

func trustInit(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var r recordFlags
	r.define(fs)
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		if r.out == "" || len(r.root) == 0 || len(r.release) == 0 {
			return usagef("need -o FILE, -root KEY and -release KEY")
		}
		rec := trust.Record{Version: 1}
		if err := r.fill(&rec, true); err != nil {
			return err
		}
		return r.write(e, &rec, nil)
	}
}

func trustRotate(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var r recordFlags
	r.define(fs)
	from := fs.String("trust", "", "the chain of records so far: `FILE`")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		if r.out == "" || *from == "" {
			return usagef("need -trust FILE and -o FILE")
		}
		a, err := openTrust(*from)
		if err != nil {
			return err
		}
		old := a.Record()
		rec := a.Record()
		rec.Version++
		if err := r.fill(&rec, false); err != nil {
			return err
		}
		return r.write(e, &rec, &old)
	}
}

// readRecord reads a single record, signed or not.
func readRecord(name string) (*trust.Note, *trust.Record, error) {
	b, err := readSmall(name)
	if err != nil {
		return nil, nil, err
	}
	n, err := trust.ParseNote(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	rec, err := trust.ParseRecord(n.Text)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return n, rec, nil
}

func trustSign(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var f noteFlags
	f.define(fs)
	out := fs.String("o", "", "write this `file` in place of changing the record")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		if err := otherThan(*out, f.files()...); err != nil {
			return err
		}
		n, rec, err := readRecord(args[0])
		if err != nil {
			return err
		}
		if f.text {
			e.printf("%s", n.Text)
			return nil
		}
		if !f.any() {
			return usagef("need -note FILE, -attach FILE, -remove NAME or -text")
		}
		if err := f.apply(n); err != nil {
			return err
		}
		if *out == "" {
			*out = args[0]
		}
		if err := e.writeNote(*out, n); err != nil {
			return err
		}
		return e.printSigners(*out, n, rec, nil)
	}
}

func trustVerify(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	from := fs.String("trust", "", "chain that devices have already: `FILE`")
	out := fs.String("o", "", "write the chain that both make together to this `file`")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		a, err := chain(*from, args[0])
		if err != nil {
			return err
		}
		if *out != "" {
			err := e.writeFile(*out, func(w io.Writer) error {
				_, err := w.Write(a.Bytes())
				return err
			})
			if err != nil || *out == "-" {
				return err
			}
		}
		rec := a.Record()
		if err := a.Expired(time.Now()); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		e.printf("%s: %s version %d\n", plain(args[0]), e.paint(32, "ok"), rec.Version)
		return nil
	}
}

// chain opens a chain by itself, or as the continuation of another one.
func chain(from, name string) (*trust.Anchor, error) {
	if from == "" {
		return openTrust(name)
	}
	a, err := openTrust(from)
	if err != nil {
		return nil, err
	}
	b, err := readSmall(name)
	if err != nil {
		return nil, err
	}
	next, err := a.Update(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return next, nil
}

// shown is what ota trust show tells.
type shown struct {
	File             string   `json:"file"`
	Version          uint64   `json:"version"`
	SecurityStep     uint64   `json:"step"`
	SecurityMin      uint64   `json:"min_security"`
	Expires          string   `json:"expires,omitempty"`
	Root             []string `json:"root"`
	RootThreshold    int      `json:"root_threshold"`
	Release          []string `json:"release"`
	ReleaseThreshold int      `json:"release_threshold"`
	signed
}

func trustShow(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	from := fs.String("trust", "", "the chain before it, to tell whose signatures are missing: `FILE`")
	asJSON := fs.Bool("json", false, "print JSON")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		b, err := readSmall(args[0])
		if err != nil {
			return err
		}
		// Of a chain the last record, be it signed or not.
		const first = "\nslotota trust "
		if i := bytes.LastIndex(b, []byte(first)); i >= 0 {
			b = b[i+1:]
		}
		n, err := trust.ParseNote(b)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		rec, err := trust.ParseRecord(n.Text)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		var old *trust.Record
		if *from != "" {
			a, err := openTrust(*from)
			if err != nil {
				return err
			}
			r := a.Record()
			old = &r
		}
		s := shown{File: args[0], Version: rec.Version, SecurityStep: rec.SecurityStep, SecurityMin: rec.SecurityMin,
			RootThreshold: rec.Root.Threshold, ReleaseThreshold: rec.Release.Threshold}
		if !rec.Expires.IsZero() {
			s.Expires = rec.Expires.Format(time.RFC3339)
		}
		for _, k := range rec.Root.Keys {
			s.Root = append(s.Root, k.String())
		}
		for _, k := range rec.Release.Keys {
			s.Release = append(s.Release, k.String())
		}
		if s.signed, err = signing(n, rec, old); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if *asJSON {
			return e.printJSON(s)
		}
		e.printTrust(&s, rec)
		return nil
	}
}

func (e *env) printTrust(s *shown, rec *trust.Record) {
	e.printf("version   %d\nexpires   %s\nsecurity  at least %d, at most %d above what the device has committed\n\n",
		s.Version, or(s.Expires, "never"), s.SecurityMin, s.SecurityStep)
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "ROLE\tNEEDS\tKEY\tSIGNED")
	for _, role := range []struct {
		name string
		*trust.Role
	}{{"root", &rec.Root}, {"release", &rec.Release}} {
		for _, k := range role.Keys {
			has := ""
			if slices.Contains(s.SignedBy, k.ID()) {
				has = "yes"
			}
			if k.Published() {
				has += " (a published key: anybody can sign with it)"
			}
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", role.name, role.Threshold, k.ID(), has)
		}
	}
	w.Flush()
	switch {
	case s.Missing+s.MissingOld > 0:
		e.printf("\n%s\n", e.paint(33, "signatures missing: "+strconv.Itoa(s.Missing)+" of its own root keys, "+strconv.Itoa(s.MissingOld)+" of those before"))
	default:
		e.printf("\n%s\n", e.paint(32, "signed"))
	}
}

// checkTrust verifies a bundle before it is sent.
func checkTrust(ctx context.Context, file, record string) error {
	p := policyFlags{trust: record}
	policy, err := p.policy()
	if err != nil {
		return err
	}
	policy.MaxWindow, policy.MaxIndex = bundle.MaxFrame, maxIndex // the device knows its own
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := policy.Verify(ctx, f); err != nil {
		code, _ := classify(err)
		return fail(code, "nothing was sent", "%s: %w", file, err)
	}
	return nil
}
