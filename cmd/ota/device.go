package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// deviceFlags say which device a command talks to, and how.
type deviceFlags struct {
	url, tokenFile, user, passwordFile, ca, cert, key string
	timeout, try                                      time.Duration
	compat, asJSON                                    bool
}

func (d *deviceFlags) define(fs *flag.FlagSet) {
	fs.StringVar(&d.url, "device", "", "`URL` of the device: "+deviceURLs+"; else OTA_DEVICE")
	fs.StringVar(&d.tokenFile, "token-file", "", "`file` with the bearer token for the device; else OTA_TOKEN")
	fs.StringVar(&d.user, "user", "", "`name` to log in with, by digest; also as http://NAME@HOST")
	fs.StringVar(&d.passwordFile, "password-file", "", "`file` with the password of -user; else OTA_PASSWORD")
	fs.StringVar(&d.ca, "ca", "", "`file` with the certificates to trust in place of the system's")
	fs.StringVar(&d.cert, "cert", "", "`file` with a certificate for this client, and perhaps its key, in PEM form")
	fs.StringVar(&d.key, "key", "", "`file` with the key of -cert; else it is in the same file")
	fs.DurationVar(&d.timeout, "call-timeout", rpcjson.DefaultCallTimeout, "`time` for one call")
	fs.DurationVar(&d.try, "try", 0, "keep trying to reach the device for this `time`")
	fs.BoolVar(&d.compat, "compat-args", false, "send parameters as args, for the oldest devices")
	fs.BoolVar(&d.asJSON, "json", false, "print JSON")
}

// device is a device to talk to.
type device struct {
	*rpcjson.Client
	e *env
}

func (d *deviceFlags) dial(ctx context.Context, e *env) (*device, error) {
	target := d.url
	if target == "" {
		target = e.getenv("OTA_DEVICE")
	}
	if target == "" {
		return nil, fail(exitUsage, "try ota simulate if you have no device", "no device: give -device URL, or set OTA_DEVICE")
	}
	if !strings.Contains(target, "://") {
		target = "http://" + target
	}
	o := &rpcjson.ClientOptions{Timeout: d.timeout, CompatArgs: d.compat, Dialers: dialers()}
	target, err := d.credentials(e, target, o)
	if err != nil {
		return nil, err
	}
	if d.ca != "" || d.cert != "" {
		c, err := d.tls()
		if err != nil {
			return nil, err
		}
		o.HTTPClient = &http.Client{Transport: &http.Transport{TLSClientConfig: c}}
	}
	c, err := rpcjson.Dial(ctx, target, o)
	if err != nil {
		return nil, usagef("%w", err)
	}
	for start := time.Now(); d.try > 0 && time.Since(start) < d.try; {
		if err := c.Call(ctx, "RPC.Ping", nil, nil); !errors.Is(err, rpcjson.ErrNoReply) {
			break
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return &device{c, e}, nil
}

// credentials fills in what the device is to be shown, and returns its URL without.
func (d *deviceFlags) credentials(e *env, target string, o *rpcjson.ClientOptions) (string, error) {
	u, err := url.Parse(target)
	if err == nil && u.User != nil && u.Scheme != "mqtt" && u.Scheme != "mqtts" { // there they are for the broker
		if d.user != "" {
			return "", usagef("-user, and a user in the URL")
		}
		o.User = u.User.Username()
		o.Password, _ = u.User.Password()
		u.User = nil
		target = u.String()
	}
	if d.user != "" {
		o.User = d.user
	}
	switch {
	case o.User != "" && d.tokenFile != "":
		return "", usagef("-user and -token-file exclude each other")
	case o.User == "" && d.passwordFile != "":
		return "", usagef("-password-file needs -user")
	case d.passwordFile != "":
		o.Password, err = secret(d.passwordFile)
		return target, err
	case o.User != "":
		if o.Password == "" {
			o.Password = e.getenv("OTA_PASSWORD")
		}
		if o.Password == "" {
			return "", usagef("no password for %s: give -password-file, or set OTA_PASSWORD", ota.Quote(o.User))
		}
	case d.tokenFile != "":
		o.Token, err = secret(d.tokenFile)
		return target, err
	default:
		o.Token = e.getenv("OTA_TOKEN")
	}
	return target, nil
}

// secret reads a file that holds one.
func secret(name string) (string, error) {
	b, err := os.ReadFile(name)
	return strings.TrimSpace(string(b)), err
}

// tls returns how to talk to a device by https.
func (d *deviceFlags) tls() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if d.ca != "" {
		b, err := os.ReadFile(d.ca)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return nil, usagef("%s: no certificates in PEM form", d.ca)
		}
	}
	if d.cert != "" {
		key := d.key
		if key == "" {
			key = d.cert
		}
		cert, err := tls.LoadX509KeyPair(d.cert, key)
		if err != nil {
			return nil, usagef("-cert: %w", err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sysInfo is what interests us of Sys.GetInfo.
type sysInfo struct {
	ID       string  `json:"id"`
	App      string  `json:"app"`
	Version  string  `json:"fw_version"`
	BuildID  string  `json:"fw_id"`
	Platform string  `json:"arch"`
	Uptime   float64 `json:"uptime"` // seconds
}

// info asks who the device is. Devices that do not tell are nobody.
func (d *device) info(ctx context.Context) (i sysInfo, err error) {
	err = d.Call(ctx, "Sys.GetInfo", nil, &i)
	var remote *rpcjson.Error
	if errors.As(err, &remote) && remote.Code == 404 {
		err = nil
	}
	return i, err
}

// deviceCommand returns a setup for commands that make one call or two.
func deviceCommand(fs *flag.FlagSet, hi int, run func(context.Context, *device, *deviceFlags, []string) error) func(context.Context, *env, []string) error {
	var f deviceFlags
	f.define(fs)
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 0, hi); err != nil {
			return err
		}
		d, err := f.dial(ctx, e)
		if err != nil {
			return err
		}
		defer d.Close()
		return run(ctx, d, &f, args)
	}
}

// nothing turns the error without a message, which devices answer when there is
// nothing to commit or revert, into one that says so.
func nothing(err error, what string) error {
	if errors.Is(err, ota.ErrCommitted) {
		return fail(exitNothing, "", "there is nothing to %s: the firmware is committed", what)
	}
	return err
}

func commit(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	trial := fs.String("trial", "", "commit only the trial with this `id`")
	return deviceCommand(fs, 0, func(ctx context.Context, d *device, f *deviceFlags, _ []string) error {
		var params any
		if *trial != "" {
			params = map[string]string{"trial": *trial}
		}
		if err := nothing(d.Call(ctx, "OTA.Commit", params, nil), "commit"); err != nil {
			return err
		}
		return d.printResult(f, result{Result: "committed"})
	})
}

func revert(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	return deviceCommand(fs, 0, func(ctx context.Context, d *device, f *deviceFlags, _ []string) error {
		if err := nothing(d.Call(ctx, "OTA.Revert", nil, nil), "revert"); err != nil {
			return err
		}
		return d.printResult(f, result{Result: "reverted", Detail: "the device reboots"})
	})
}

func snapshot(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	asRevert := fs.Bool("set-as-revert", false, "put the running firmware on trial once more, with the snapshot to go back to")
	var timeout durationFlag
	fs.Var(&timeout, "commit-timeout", "`time` for the commit of that trial; else the device chooses")
	return deviceCommand(fs, 0, func(ctx context.Context, d *device, f *deviceFlags, _ []string) error {
		params := map[string]any{}
		if *asRevert {
			params["set_as_revert"] = true
		}
		if timeout.d != nil {
			params["commit_timeout"] = timeout.seconds()
		}
		var res struct {
			Slot int `json:"slot"`
		}
		if err := d.Call(ctx, "OTA.CreateSnapshot", params, &res); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				return fail(exitUnreachable, "copying takes long; a longer -call-timeout waits for it", "%w", err)
			}
			return err
		}
		return d.printResult(f, result{Result: "snapshot", Slot: &res.Slot})
	})
}

func state(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	active := fs.Int("active", -1, "slot to boot next: `N`")
	rev := fs.Int("revert", -1, "slot to go back to: `N`")
	committed := fs.String("committed", "", "whether the active firmware is committed: `BOOL`")
	var timeout durationFlag
	fs.Var(&timeout, "commit-timeout", "`time` for the commit")
	return deviceCommand(fs, 0, func(ctx context.Context, d *device, f *deviceFlags, _ []string) error {
		patch := map[string]any{}
		if *active < -1 || *rev < -1 {
			return usagef("slots are numbered from 0")
		}
		if *active >= 0 {
			patch["active_slot"] = *active
		}
		if *rev >= 0 {
			patch["revert_slot"] = *rev
		}
		switch *committed {
		case "":
		case "true", "false":
			patch["is_committed"] = *committed == "true"
		default:
			return usagef("-committed: need true or false")
		}
		if timeout.d != nil {
			patch["commit_timeout"] = timeout.seconds()
		}
		if len(patch) > 0 {
			if err := d.Call(ctx, "OTA.SetBootState", patch, nil); err != nil {
				return err
			}
		}
		s, err := d.BootState(ctx)
		if err != nil {
			return err
		}
		if f.asJSON {
			return d.e.printJSON(s)
		}
		d.e.printState(s)
		return nil
	})
}

// view is all that a device tells about itself.
type view struct {
	Info   sysInfo              `json:"info"`
	Status rpcjson.DeviceStatus `json:"status"`
	State  ota.BootState        `json:"boot_state"`
	// Findings are what the device reports that would stop a rollback.
	Findings []ota.Finding `json:"findings,omitempty"`
}

func (d *device) look(ctx context.Context) (v view, err error) {
	if v.Status, err = d.Status(ctx); err == nil {
		if v.State, err = d.BootState(ctx); err == nil {
			v.Info, err = d.info(ctx)
		}
	}
	return v, err
}

// settle waits until an update is over and the device has rebooted, which may take
// a minute.
func (d *device) settle(ctx context.Context, v view) (view, error) {
	bar := d.e.bar("update")
	defer bar.end()
	var err error
	for seen := time.Now(); ; v, err = d.look(ctx) {
		var remote *rpcjson.Error
		switch {
		case err == nil && v.Status.State != rpcjson.StateProgress && v.Status.State != rpcjson.StateSuccess:
			return v, nil
		case err == nil:
			seen = time.Now()
			bar.show(int64(v.Status.Percent), 100)
		case errors.As(err, &remote) && remote.Code != 418, time.Since(seen) > time.Minute:
			return v, err
		}
		if err := sleep(ctx, followEvery); err != nil {
			return v, err
		}
	}
}

func (e *env) printState(s ota.BootState) {
	committed := e.paint(32, "yes")
	if !s.Committed {
		committed = e.paint(33, "no, on trial or about to be")
	}
	e.printf("active    slot %v\ncommitted %s\n", s.Active, committed)
	if s.Revert != ota.NoSlot {
		e.printf("revert    slot %v\n", s.Revert)
	}
	if !s.Committed && s.CommitTimeout > 0 {
		e.printf("timeout   %v\n", s.CommitTimeout)
	}
}

func status(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	follow := fs.Bool("follow", false, "wait until no update is in progress")
	return deviceCommand(fs, 0, func(ctx context.Context, d *device, f *deviceFlags, _ []string) error {
		v, err := d.look(ctx)
		if err == nil && *follow {
			v, err = d.settle(ctx, v)
		}
		if err == nil {
			v.Findings, err = d.Findings(ctx)
		}
		if err != nil {
			return err
		}
		if f.asJSON {
			return d.e.printJSON(v)
		}
		i, st, s := v.Info, v.Status, v.State
		for _, v := range []struct{ label, value string }{
			{"device", i.ID}, {"app", i.App}, {"platform", i.Platform}, {"version", i.Version}, {"build id", i.BuildID},
			{"uptime", (time.Duration(i.Uptime) * time.Second).String()}, {"status", st.Message},
		} {
			if v.value != "" {
				d.e.printf("%-9s %s\n", v.label, plain(v.value))
			}
		}
		if st.State == rpcjson.StateProgress {
			d.e.printf("progress  %.0f %%\n", st.Percent)
		}
		if c := countsOf(st); c != (ota.Counts{}) {
			d.e.printf("bytes     %s\n", countsText(c))
		}
		d.e.printState(s)
		d.e.printFindings(v.Findings)
		return nil
	})
}

// countsOf returns the counts of an update, all 0 if the device does not tell.
func countsOf(s rpcjson.DeviceStatus) ota.Counts {
	return ota.Counts{Downloaded: s.Downloaded, Read: s.Read, Copied: s.Copied, Skipped: s.Skipped, Written: s.Written}
}

func countsText(c ota.Counts) string {
	return fmt.Sprintf("%d downloaded, %d read, %d copied, %d skipped, %d written", c.Downloaded, c.Read, c.Copied, c.Skipped, c.Written)
}

func call(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	return deviceCommand(fs, 2, func(ctx context.Context, d *device, _ *deviceFlags, args []string) error {
		if err := want(args, 1, 2); err != nil {
			return err
		}
		var params any
		if len(args) == 2 {
			if !json.Valid([]byte(args[1])) {
				return usagef("the parameters are not JSON")
			}
			params = json.RawMessage(args[1])
		}
		res := json.RawMessage("null")
		if err := d.Call(ctx, args[0], params, &res); err != nil {
			return err
		}
		d.e.printf("%s\n", res)
		return nil
	})
}

// durationFlag is a time that may be left out.
type durationFlag struct{ d *time.Duration }

func (f *durationFlag) String() string { return "" }

func (f *durationFlag) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	f.d = &d
	return err
}

func (f *durationFlag) seconds() int64 { return int64((*f.d + time.Second - 1) / time.Second) }

// result is the outcome of a command that changes a device.
type result struct {
	Result  string  `json:"result"` // installed, committed, rolled-back, on-trial, same, reverted, snapshot
	Slot    *int    `json:"slot,omitempty"`
	Version string  `json:"version,omitempty"`
	BuildID string  `json:"build_id,omitempty"`
	Bytes   int64   `json:"bytes,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Detail  string  `json:"detail,omitempty"`
}

func (d *device) printResult(f *deviceFlags, r result) error {
	if f.asJSON {
		return d.e.printJSON(r)
	}
	colour := 32
	if r.Result == "rolled-back" || r.Result == "on-trial" {
		colour = 33
	}
	s := d.e.paint(colour, r.Result)
	if r.Slot != nil {
		s += fmt.Sprintf(" slot %d", *r.Slot)
	}
	if r.Version != "" {
		s += " version " + plain(r.Version)
	}
	if r.Bytes > 0 {
		s += fmt.Sprintf(" (%d bytes in %.1f s)", r.Bytes, r.Seconds)
	}
	if r.Detail != "" {
		s += ": " + plain(r.Detail)
	}
	d.e.printf("%s\n", s)
	return nil
}

// installFlags are those of push and update.
type installFlags struct {
	deviceFlags
	timeout, commitTimeout, commitAfter durationFlag
	wait, skipSame                      bool
	waitTimeout                         time.Duration
}

func (f *installFlags) define(fs *flag.FlagSet) {
	f.deviceFlags.define(fs)
	fs.Var(&f.timeout, "timeout", "`time` that the device waits for data before it gives up; else it chooses")
	fs.Var(&f.commitTimeout, "commit-timeout", "`time` in which the new firmware must be committed; 0: it commits itself; else the device chooses")
	fs.BoolVar(&f.wait, "wait", false, "follow the device until the firmware is committed or rolled back")
	fs.Var(&f.commitAfter, "commit-after", "commit once the new firmware has answered for this `time`; implies -wait")
	fs.BoolVar(&f.skipSame, "skip-same", false, "do nothing (exit code 3) if the device runs that version and build")
	fs.DurationVar(&f.waitTimeout, "wait-timeout", 10*time.Minute, "`time` after which -wait gives up")
}

// installed is what a new firmware is known by.
type installed struct {
	before         ota.BootState
	version, build string // "" if not known
	bytes          int64
	start          time.Time
}

func push(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var f installFlags
	f.define(fs)
	chunk := fs.String("chunk", "32K", "`bytes` of each piece; it becomes smaller by itself for devices with little memory")
	resume := fs.Bool("resume", false, "continue where a push of the same file was broken off")
	noCheck := fs.Bool("no-check", false, "send the file as it is, even if this tool does not understand it")
	trusted := fs.String("trust", "", "send nothing that enough release keys of this trust record have not signed: `FILE`")
	begin := fs.String("begin", "", "parameters of OTA.Begin, in place of all others: `JSON`")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		size, err := parseSize(*chunk)
		if err != nil || size < 1 || size > 1<<20 {
			return usagef("-chunk: need 1 to 1M")
		}
		o := &rpcjson.PushOptions{ChunkSize: int(size), Timeout: f.timeout.d, CommitTimeout: f.commitTimeout.d, Resume: *resume}
		if *begin != "" {
			if !json.Valid([]byte(*begin)) {
				return usagef("-begin: not JSON")
			}
			o.Begin = json.RawMessage(*begin)
		}
		name := args[0]
		if strings.HasPrefix(name, "http://") || strings.HasPrefix(name, "https://") {
			var remove func()
			if name, remove, err = download(ctx, e, name, maxDownload); err != nil {
				return err
			}
			defer remove()
		}
		if *trusted != "" {
			if err := checkTrust(ctx, name, *trusted); err != nil {
				return err
			}
		}
		in := installed{}
		var platform string
		if !*noCheck {
			a, err := openArchive(ctx, name)
			if code, _ := classify(err); code == exitVerify {
				return fail(exitVerify, "nothing was sent; -no-check sends it all the same", "%w", err)
			}
			if err != nil {
				return err
			}
			m := a.r.Manifest()
			in.version, in.build, platform = m.Version, m.BuildID, m.Platform
			a.Close()
		}
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		stat, err := file.Stat()
		if err != nil {
			return err
		}
		d, err := f.dial(ctx, e)
		if err != nil {
			return err
		}
		defer d.Close()
		now, err := d.info(ctx)
		if err != nil {
			return err
		}
		switch {
		case platform != "" && now.Platform != "" && platform != now.Platform:
			return fail(exitVerify, "nothing was sent; -no-check sends it all the same", "the bundle is for %s, the device is %s", ota.Quote(platform), ota.Quote(now.Platform))
		case f.skipSame && in.version != "" && now.Version == in.version && now.BuildID == in.build:
			return errors.Join(d.printResult(&f.deviceFlags, result{Result: "same", Version: in.version, BuildID: in.build}),
				fail(exitNothing, "", "the device runs this version already"))
		}
		if in.before, err = d.BootState(ctx); err != nil {
			return err
		}
		in.bytes, in.start = stat.Size(), time.Now()
		bar := e.bar("push")
		o.Progress = bar.show
		err = d.Push(ctx, file, stat.Size(), o)
		bar.end()
		if err != nil {
			return err
		}
		return f.after(ctx, d, in)
	}
}

// maxDownload is the most that a zip file without the extensions of ZIP64 can have.
const maxDownload = 1<<32 - 1

// download gets a bundle of at most so many bytes, for a device that cannot reach the
// server itself.
func download(ctx context.Context, e *env, url string, most int64) (name string, remove func(), err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", nil, usagef("%w", err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", nil, fmt.Errorf("download: HTTP status %s", plain(res.Status))
	}
	tooLarge := fmt.Errorf("download: at most %d bytes: %w", most, ota.ErrTooLarge)
	if res.ContentLength > most {
		return "", nil, tooLarge
	}
	f, err := os.CreateTemp("", "ota-*.zip")
	if err != nil {
		return "", nil, err
	}
	remove = func() { os.Remove(f.Name()) }
	bar := e.bar("download")
	var done int64
	_, err = io.Copy(f, io.TeeReader(io.LimitReader(res.Body, most+1), writerFunc(func(p []byte) (int, error) {
		done += int64(len(p))
		bar.show(done, res.ContentLength)
		return len(p), nil
	})))
	bar.end()
	if done > most {
		err = tooLarge
	}
	if err = errors.Join(err, f.Close()); err != nil {
		remove()
		return "", nil, err
	}
	return f.Name(), remove, nil
}

type writerFunc func(p []byte) (int, error)

func (w writerFunc) Write(p []byte) (int, error) { return w(p) }

func update(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var f installFlags
	f.define(fs)
	file := fs.String("file", "", "`name` of a bundle in the device's own file system, in place of a URL")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 0, 1); err != nil {
			return err
		}
		o := &rpcjson.PullOptions{File: *file, Timeout: f.timeout.d, CommitTimeout: f.commitTimeout.d, IgnoreSameVersion: f.skipSame}
		if len(args) == 1 {
			o.URL = args[0]
		}
		if o.URL != "" && o.File != "" {
			return usagef("-file and URL exclude each other")
		}
		d, err := f.dial(ctx, e)
		if err != nil {
			return err
		}
		defer d.Close()
		in := installed{start: time.Now()}
		if in.before, err = d.BootState(ctx); err != nil {
			return err
		}
		bar := e.bar("update")
		o.Progress = func(percent float64) { bar.show(int64(percent), 100) }
		err = d.Update(ctx, o)
		bar.end()
		if err != nil {
			return err
		}
		// Until it reboots it knows.
		if st, err := d.Status(ctx); err == nil && countsOf(st) != (ota.Counts{}) {
			e.notef("bytes: %s", countsText(countsOf(st)))
		}
		// A device that has rebooted may not answer yet.
		if s, err := d.BootState(ctx); err == nil && s.Committed && in.before.Committed && s.Active == in.before.Active {
			if st, err := d.Status(ctx); err == nil && st.State == rpcjson.StateIdle {
				return errors.Join(d.printResult(&f.deviceFlags, result{Result: "same"}),
					fail(exitNothing, "", "the device runs this version already"))
			}
		}
		return f.after(ctx, d, in)
	}
}

const followEvery = 500 * time.Millisecond

// after reports a success, or follows the device first.
func (f *installFlags) after(ctx context.Context, d *device, in installed) error {
	res := result{Result: "installed", Version: in.version, BuildID: in.build, Bytes: in.bytes, Seconds: time.Since(in.start).Seconds()}
	if !f.wait && f.commitAfter.d == nil {
		d.e.notef("hint: the device reboots into it; then try it, and call ota commit, or it goes back (-wait, -commit-after)")
		return d.printResult(&f.deviceFlags, res)
	}
	err := f.follow(ctx, d, in, &res)
	if res.Result == "installed" {
		return err
	}
	return errors.Join(d.printResult(&f.deviceFlags, res), err)
}

// follow follows the device through the reboot and the trial, and fills in res.
func (f *installFlags) follow(ctx context.Context, d *device, in installed, res *result) error {
	const (
		installing = iota // not yet rebooted
		rebooting         // not seen since
		trial
	)
	phase := installing
	limit := time.Now().Add(f.waitTimeout)
	var since time.Time // when the trial was first seen, in a row
	e := d.e
	for ; ; _ = sleep(ctx, followEvery) {
		if ctx.Err() != nil {
			return fail(exitUncommitted, "ota status tells how it goes on", "interrupted")
		}
		if time.Now().After(limit) {
			if phase == trial {
				res.Result = "on-trial"
				return fail(exitUncommitted, "decide with ota commit or ota revert", "the firmware is still on trial after %v", f.waitTimeout)
			}
			return fail(exitUnreachable, "ota status, once the device answers again", "the device has not come back after %v", f.waitTimeout)
		}
		var st rpcjson.DeviceStatus
		s, err := d.BootState(ctx)
		if err == nil {
			st, err = d.Status(ctx)
		}
		var remote *rpcjson.Error
		switch {
		case errors.As(err, &remote) && remote.Code == 404: // the oldest devices have no OTA.Status
			if phase == installing {
				st.State = rpcjson.StateSuccess
			}
		case errors.As(err, &remote), errors.Is(err, rpcjson.ErrNoReply): // on its way down or up
			if phase == installing {
				phase = rebooting
			}
			since = time.Time{}
			continue
		case err != nil:
			return err
		}
		if st.State == rpcjson.StateSuccess {
			continue // the reboot is still to come
		}
		slot := int(s.Active)
		res.Slot = &slot
		switch {
		case s.Committed && s.Active == in.before.Active:
			res.Result, res.Detail = "rolled-back", st.Message
			return fail(exitUncommitted, "", "the device went back to what it ran before")
		case s.Committed:
			res.Result = "committed"
			return nil
		}
		if phase != trial {
			phase = trial
			e.notef("on trial in slot %v, commit timeout %v", s.Active, s.CommitTimeout)
			if s.CommitTimeout > 0 {
				limit = limit.Add(s.CommitTimeout)
			}
		}
		if since.IsZero() {
			since = time.Now()
		}
		if f.commitAfter.d == nil || time.Since(since) < *f.commitAfter.d {
			continue
		}
		now, err := d.info(ctx)
		if err != nil {
			continue // perhaps it is going down
		}
		if now.BuildID != "" && in.build != "" && now.BuildID != in.build || now.Version != "" && in.version != "" && now.Version != in.version {
			res.Result = "on-trial"
			return fail(exitUncommitted, "ota commit commits it all the same", "not committed: the device runs %s %s, not %s %s",
				ota.Quote(now.Version), ota.Quote(now.BuildID), ota.Quote(in.version), ota.Quote(in.build))
		}
		err = d.Call(ctx, "OTA.Commit", nil, nil)
		if errors.As(err, &remote) && remote.Message != "" {
			res.Result = "on-trial"
			return err
		}
		// Committed, perhaps by somebody else, or not heard: look again.
	}
}
