"""What tokenizer.h's files hold about characters: classes, Unicode's normal forms, regular expressions as automata.

For someone whose tokenizer cuts text by an expression of its own, or brings it to NFC or NFKC first. normal_form() and
rules_tables() are what convert_tokenizer.py calls; classes, forms and rules as tokenizer.h's comment has them.
"""
import base64
import re
import struct
import unicodedata
import zlib


class Refused(Exception):
    pass


# What the libraries know of Unicode (Python's own tables depend on its version): runs of code points of one class,
# (distance << 3 | class) in base 128. tokenizer_vs_libraries.py --classes printed them. CLASSES: those of tokenizer.h,
# of Unicode 16, as tiktoken's and tokenizers' regular expressions have them. SIGNS: 1 punctuation, 2 symbols; to
# tokenizers' Punctuation, of Unicode 8, 3 is no punctuation, 4 of the symbols and 5 of all else are. FORMS: 1,
# what tokenizers' normal forms, of Unicode 9, change or put in order.
CLASSES = (
    b"c-pmAe`p)`73aN^ou~VLkDYX<a`DOK;#0aylngm`;4&qk#P)EfbR5VX9!`fhH(-_w3|T>t29(Gt9!ZBcdBbf}&`1gy&WbiWpe_lRrGIE71Gim=AR"
    b"Txl1wor)hzr>kw!O2{vJBeLl=7tSk9Y6;-ur&P?|t6)JKnE=js?4xV8;@Cm;MTrr#-q#oq{wgT8HR27eU>tMjwe{51BuN;$gcnzBcNJb%ia@;-7q"
    b"rt?|RL5moI?;g@*yp%!DIOh;6GRNBQ>SZmiO^SOw61E#?pJ>q3a&}lfnfw_XBDjBL3rEZFH%bra^^xH3?8td5j8Jf4K6mBN=vT|H`s2e1AJ=zB1U"
    b"*bZ(Fj2II2JL8Ie+wl^or(II;5r||aQZ#`Ed;J9X4{4I%^p*iZlYirR0b(lp$W$Iwh?-+a2oTvOC}i$;L5zTrB{LLV7bHTMG%?({9kYp<SATGY*_"
    b")B9nuqlm;_7Y4Be=K@CDh98CuXyoBGMsMN&@`^hCxWNv0(-?tM8uB$K3<(oHK#Sx3;GAtOl#EHNl7abLz`T{&q<cJ!#pw(>F~|Hs(6KxoX`ZLQl1"
    b"gq9f+Br>)o99!p+ZtJ#XkEXn&B^`r$>ACU4=^WdrgD63`o((v=b-_lA(8z!<LL=)E!Mcfckse)y0>Y$c-O$VHXsms5DV@}^Y<-pwiPuhp&Brw;$n"
    b"cYt%J606b_S+?Xi^cTpWdC*f=d{><_Q)fF(k}98J-~NYk}dEkuHP2vkJV9DP`nD6;nJlwhhZF?x$<Ydw3SKpr_YO+0r(%N%!!W)P|f`4WqP$;!PB"
    b")-7tk?@P%;OKyIe+(|J)e6z*mtru9@6>=GP@T3bA0FF#@Y48#(on~_dCmz@D8e+I0P8PLbZg(dZ|b4m$qawR2#oxy3aBs<Y)%WgAfP*A!SDcl7)n"
    b"i_q&umXlRvW)H$>>QrM%iy^elt8w?)Og_`>c0!8mGnJ41-VYvGx)5%3WpMfTR1Ux4y!N_*qwzc#-CJaOA})jN0^+0l;{;4Ra<Z3Kb1pj1ux+7$XA"
    b"?Fk48^^^%nMJVww2feS6pX97A46>fU`5Ys|g-JT>O2)M0Vg;lyK3*IsXHIC*^dBhbG=|3*5=k(bD%`2xq!C{y@TpiLAae+O&Y=yk7abQpU@7sX@x"
    b"7S-t@?IlIkyo=kHm5(DexcK!I`1`j`tO01peQ@gvVXi0E@zo!)-p!5NsM1puuc1m?$yijf^gJhR-WLy$EaAV9Ug#t@L4St*8Q~>t-L18mx?zc>Hs"
    b"Pc>VOH8Yok9uAN(oM4@G<1HBKKFYST;*%lyaoiQeTOzpwZIplTgrq4PVGxAsrcr&y_HZi;*FH4hJ8s6C1zODT(#x#HV#gP^eversAzk4|2lV8|PK"
    b"Tbe~0Yuu&BqVz)?&l;Gq}QD>%5Rh~6wlxcW6=&eA;CShuYTaYs@!}wSWlI}g6IKt7kO*~!j7&#~MNzu<>+EWL{uo*=#kQv(yDd;L##sSYr>V=HK6"
    b"yB!F7u1!f9p$z&n3LhE>L1$1>flZ(XQv}8j~PqtzeoRvURp9>k29{)T7g+^KZVW5Do~0THRURfrb;jgB`8NcQKwho{zGh}(Ppn%GOSl{l;KY>jO("
    b"IkOjNMB;b037Hk21ZKfQq})B<}-d0ykHdJ>)dYaj+Fy?|bt@ve$)PV?TvKjKwfi6nyVDt0k%5&Npj4~C<~s2|nUVYR6Gs%}@6vAU73K_Pb)GGYnE"
    b";9P`jq*z9-S7g*7(Z~PnT^JZFE1^5v(-$Gba5^7ZR5lxl5+v>*R~~(v>u@1rV6{@(;3c>Xy0{Hi8FS(m=$pMV)RaPvwavozzG=7uez~m?c|)01el"
    b")A>={bkaK(MpWU4x`2)Ed02-DUho$u+YK)@8-L4F&33fM=W=z}4U#enj|Zp$_})3rg{sRp6kd{qBc2yqgX+U{BC%pTh|)aHT<gXOQ@#J*gaVQjSa"
    b"%_`SBd3M11XuEQuJIo(m#s*xy)AbSr-w+Fq>1EpOW>!m%c+39V%=_kFBfNLs=8VWhc?+N0p;wz`a`Uh}9serRRND1o>Oe$yj9B3ezSMQ;3^0}n+3"
    b"Qj6hVAC_fJidpAXivZu_9nl4%;M%z*S{uiVevQZC-5ZB!dQ-<0y*~KO~^>ybfu8`!C*eZ!OZIT<tga~$ikbLl}<nP$&pnovFZvmBA4V89t(N~#RU"
    b"%3K04L{jt#R0a^hMf+|>eRlHuDdE7`rC409&Y<9V7Lnm5jXv!7F7T+ATv_Qyjs*G9+A!wp>8b+P?!`zff(o9AGv{b;Fg5=3vY(EJCa>#1vV$}0R4"
    b"g89P@mt%&r>~4e`HtdZ|Dt_KM7-+sY59wJb+b!%2eka3?*5O)vGm;XruIzTl%MqRTbwEF|_#f=6J#`I(ORq<qwX2woAEggCE9r>Sw``rAhGu(u+#"
    b"bvZN&Q6z$pvQx%{r`Z@{*bUoawKEb1rKAZ9^3fR^k2j2E0LU!&~q+`0CFg98pw{QB03H(R~iXim!ez<myo;mW%r8+9>LA84AbiEC2t$46z2N{OkU"
    b"_PNl@OGU?Qn)U?u1KcNNiWbwp6L9N1$%mvMtQ(*dh_?*AWX{7Ro7ACWPB5>)Hxe9a&ZsF!&zVjAvtF3~e1#^%49I*@z;=D}k_y2^yz!}Wa=HN<qQ"
    b"_(EVc|X!ZtyqzcXoesXMr*(;IQV<WrLgC8UFUy7;Ve97XH6~;Q;@b8!lvN0)cC8f^R4DeADLxbDr3)zW=yy6$kaQ^(Um7EFT={F%J-WKm@d75lke"
    b"WZ(%1eA(U)*D")


SIGNS = (
    b"c-n1~KTKO!6vlP#eSf}tUBdB8syw@?^zy1A*F$Qdwz4c$A}mF8G44W`5R*eYP$tS`yNgYiK$nno0G2lH0xY%70?rcLr8bkvLU0F67VJnBCQBcgqb"
    b"nU9-E*$ach33Ul8CBN<xM#eZc<cfG)V_`Rp`$&2afg}C<kFgP$OIsT6es;g?KWE6sc_EKH{v<w{Q$phZ2W^9k(Z-f)`=D61+kYM>+feA;nF@+p#c"
    b"-44x3Hh58NU`ka?b142WfJ;YO30grMB&utvq8hsmU80*+b;S;nzxXx<YXc_nkQ(V@OWu;vwu|){fKzUUIbvdRJIvl^t11r%txNTx{WTGb0LE(Q#)"
    b"U~3X;Z_aqDpy6ZDW=Oe5#hReBznYoBvs;P%~PrL<hSlC+iS~MPjcQEdw|A0Xm`e)zdl@|eY(FzYF^DAQ-o(CL7zo&C0To#GeKfJq2Gz}F~fc=?rF"
    b"3n`v<rEE;*OOyEMIGUKqP{FtX66l5_@?S&!_}K>B&%Y~OZrLcg%eHxfU3it{!GxD@Is&EK3|6aSEYVa{z2wJ1kH2a!y8E*M9ggLNI796{5>mSR6$"
    b"5ZhuB1-hh}3mV6APGl-#Id`k@o6H%7uCB<c<Sx7G7N)RnC&nu@$u*15m6!3F(%UilK)4De$pe9smCX|e6RDBAX>s5;EG+WC#`znCI*QZ|RMVA>Q{"
    b"m+)y+e<MS`5~swBl##eT=DO%TDU#Jg>65B_|rPNRF$sQCx{Lu^L5Qq8CB+UH~2MXatbt!xK9KbputATs4x1ruWOo*U{Hu?CDrXc->I4Yq9crwwDi"
    b"N8=nT$K7?`)%tYJ5k;5VW)sB4^0Cr%ZIb5Mb%k5CMV_+3gyd1`Jc3&!V%(17Y8;ZR)(|bdBYsQWQ{~6;WBU{E9eUJP%vCdz_?cZ&F29%7rcUNQ2c"
    b"lR7`?-m+=U&CMck8;BW+W6>HZP=%BdpMZBb0XvJE^+FD{4-gmM@AH_P{nM0g~q$T^<H}_b6!n)YXR8{IvjiQ1FoWY`#Iix$){fgvd?X-+~Gc-2!F"
    b"$xTXL54lKw-~sHp4mjOK&ui4-p;T5A7mzev$+v|{_0=IE@C<yn7Uj;BZW#rOp|vp)Cb#)oqYPBxm3@5|JZGd((ydaU$``9D6H8R!"
)
FORMS = (
    b"c-oCrJ!~pR5Z3Jd&EWT(*+hx<lx9zgqN9WEP#U|#N`oUsG97f#;V!S^I+MyYQRqw)`8v}*x<?n3#&nR%bPuI59dwz!kSOV*(e3T+&d$&GeS3KY8%"
    b"UU-w%U-P8a1h=Q+;~V9q0$pGN%ij>6*R={Q+{teV)LtATC33P@3z5ZPYx19NECZr=d!)iZNC*LNZIpmXMMRhB(GLlWZmC8jpZ8IDO55+v(EdzSS&"
    b"=YPzF&hj{f-NeC9hg@4mXr|J=Mz{Jjdsas}cSxk1Ka1U$9E6uU8QoW&cqs$^2&_`G*=~Bxh{;`cOwgKLnTM0P{WVz~=+eYIqaI<}gZPc<o^RV#jD"
    b"iU-WT!dIwE{C>}-A4FM8k+`Ec;C)LO!(I3z<Y&l-hfm_cqNvU*2P9ou;li?R=RjBvk{L2moop_Ouun}><F)M^9GM-Hg8$FoWh01+#4+XGOV*0M+)"
    b"mQk;ZwZnlq1Ao@Ac*xRAzslqIqq^Vl<VL-#;0(8sY_2i3bu@*LEkKrnk!GF+TO9zZ{O^aBlq`JX|g(4?EXAk#IM5{Ebur%Tf>A!NM<>a}sMdI`pz"
    b"ca~fh7S)(jG`EsbElKM`@5-GR3#?$Ko)a3*9X?eF>ev$_5rGWXsSwX~cB4?3d$w*j9v7djar7O|Ln9O%V;)6j=g`l?p*offcAws^6fRXw5HTb82c"
    b"`d-F2|C=(q>LX#NGezuB~MEUW0g$hX<e!>hhrI5Ydp2zno*z+Jnsl-bXk`3A;PP4cx=hGlg<o3*qNdpJwSC1&JcGBJc5vUfJc+tuiae559g5XDaK"
    b"a)n}meB>tChq}E@IVd(28Z=re<Xw@H;?g&|A6NmeIOkU68T6uL$oKd#7I6lXM(s5rRFO*5JsPOT7TzI&0DBWV83*T%M$GrD&>x(>BA&<{^<nG4;v"
    b"N+wn5wT4pcSm{liF1r_7V#v)$u;JG$Q|>t`A-!*{-!!{?NWXcf<nJG67hcd7|?rPbRk`7OC6~(qdT9hh%OUFib|wAsr2D<{qU*2_wpfR?uU~}ziI"
    b"I!WV<jczO^K3<C2h;9C4&z@)t?wwEnlbFDtQa>DQ82Rrw3ZYx>nqRTvwp74THp2u=S*CCvu!f48s6pKnY3Z2"
)


def runs(table):
    """first code point << 3 | class of each run"""
    out, first, value, shift = [], 0, 0, 0
    for byte in zlib.decompress(base64.b85decode(table)):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            first += value >> 3
            out.append(first << 3 | value & 7)
            value = shift = 0
    return out


def normal_form(name, of_python=False):
    """the tables of "NFC" or "NFKC" for tokenizer.h, as tokenizers has them or as this Python has them"""
    known, start = [], None
    for run in runs(FORMS):
        if start is not None:
            known += map(chr, range(start, run >> 3))
        start = run >> 3 if run & 7 else None
    if of_python:
        known = [c for c in map(chr, range(0x80, END)) if not "\uac00" <= c <= "\ud7a3" and
                 (unicodedata.combining(c) or unicodedata.normalize("NFKD", c) != c)]
    out, compositions = [numbers((len(known),))], []
    for c in known:
        codes = [ord(d) for d in unicodedata.normalize(name.replace("C", "D"), c) if d != c]
        out.append(numbers((ord(c) << 8 | unicodedata.combining(c), len(codes), *codes)))
        pair = unicodedata.decomposition(c).split()
        if len(pair) == 2 and "<" not in pair[0] and unicodedata.normalize("NFC", c) == c:
            compositions.append((int(pair[0], 16), int(pair[1], 16), ord(c)))
    return b"".join(out + [numbers((len(compositions),))] + [numbers(c) for c in compositions])


def numbers(values):
    return struct.pack(f"<{len(values)}I", *values)


# ---- regular expressions: sets of code points, then an automaton that tokenizer.h walks over

END = 0x110000  # of code points; also the end of the text, as a character
LARGE = "its regular expression needs too large an automaton"


def union(*sets):
    """sets: sorted (first, behind the last)"""
    out = []
    for first, end in sorted(run for one in sets for run in one):
        if out and first <= out[-1][1]:
            out[-1][1] = max(end, out[-1][1])
        else:
            out.append([first, end])
    return tuple(map(tuple, out))


def inverse(runs_):
    bounds = [0, *(bound for run in runs_ for bound in run), END]
    return tuple(run for run in zip(bounds[::2], bounds[1::2]) if run[0] < run[1])


def table_set(table, *kinds):
    """code points of these classes"""
    starts = [*runs(table), END << 3]
    return union([(a >> 3, b >> 3) for a, b in zip(starts, starts[1:]) if a & 7 in kinds])


PROPERTIES = {"L": (CLASSES, 1, 2, 3), "Ll": (CLASSES, 2), "M": (CLASSES, 4), "N": (CLASSES, 5), "P": (SIGNS, 1, 3),
              "S": (SIGNS, 2, 4), "P8": (SIGNS, 1, 4, 5), "LuLt": (CLASSES, 1), "LmLo": (CLASSES, 3)}
ESCAPES = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}


class Regex:
    """Parses to ("set", runs), ("look", runs) of the character that follows, ("all", parts), ("any", parts),
    ("repeat", part, least, most or None). Knows what the expressions of tokenizers are made of, in Oniguruma's syntax;
    refuses the rest."""

    def __init__(self, text):
        self.text, self.at, self.any_case, self.depth = text, 0, False, 0
        try:
            self.tree = self.alternatives()
        except RecursionError:
            self.refuse()
        if self.at < len(self.text):
            self.refuse()

    def refuse(self):
        raise Refused(f"the regular expression {self.text[:300]!r} is none that tokenizer.h knows, at {self.at}")

    def ahead(self, *wanted):
        return next((w for w in wanted if self.text.startswith(w, self.at)), None)

    def next(self, *wanted):
        """takes one of the wanted, if it is there"""
        found = self.ahead(*wanted)
        self.at += len(found or "")
        return found

    def take(self):
        if self.at >= len(self.text):
            self.refuse()
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self):
        every = [self.sequence()]
        while self.next("|"):
            every.append(self.sequence())
        return every[0] if len(every) == 1 else ("any", every)

    def sequence(self):
        out, possessive = [], []
        while self.at < len(self.text) and not self.ahead("|", ")"):
            part = self.atom()
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.next("*", "+", "?"), (None, None))
            if least is not None and self.next("+"):
                possessive.append(len(out))
            elif least is None and self.next("{"):
                found = re.compile(r"(\d+)(,?)(\d*)\}").match(self.text, self.at)
                if not found or max(int(n or 0) for n in found.group(1, 3)) > 64:
                    self.refuse()
                self.at = found.end()
                least, most = int(found[1]), int(found[3]) if found[3] else None if found[2] else int(found[1])
                if most is not None and most < least or self.ahead("+", "*"):
                    self.refuse()
            if least is not None and (self.ahead("?") or part[0] == "look" or most is None and nullable(part)):
                self.refuse()
            out.append(part if least is None else ("repeat", part, least, most))
        for i in possessive:  # as greedy ones, where giving back would lead to no match
            for after in out[i + 1:]:
                optional = after[0] == "repeat" and after[2] == 0
                first = after[1] if after[0] == "repeat" else after
                if out[i][1][0] != "set" or first[0] not in ("set", "look") or intersect(first[1], out[i][1][1]):
                    self.refuse()
                if not optional:
                    break
            else:
                if self.depth:  # what comes behind the group is not known here
                    self.refuse()
        return ("all", out)

    def group(self):
        self.depth += 1
        part = self.alternatives()
        self.depth -= 1
        return part

    def atom(self):
        if self.next("(?i:"):
            start, before, self.any_case = self.at, self.any_case, True
            part = self.group()
            self.any_case = before
            inside = re.sub(r"\[[^]]*]", "[", self.text[start:self.at])
            letters = re.sub(r"\(\?i?:|[()]", "", inside)
            if re.search("(?i)s[st]|f[fil]", letters):
                self.refuse()  # one character matches both: \u00df, \ufb00, ...
        elif found := self.next("(?!", "(?="):
            part = self.group()
            if part[0] != "all" or [p[0] for p in part[1]] != ["set"]:
                self.refuse()
            runs_ = part[1][0][1]
            part = "look", runs_ if found == "(?=" else inverse(runs_) + ((END, END + 1),)
        elif self.next("(?:") or self.ahead("(") and not self.ahead("(?") and self.next("("):
            part = self.group()
        elif self.next("$"):
            return "look", ((10, 11), (END, END + 1))
        else:
            return "set", self.bracket() if self.next("[") else self.character()
        if not self.next(")"):
            self.refuse()
        return part

    def folded(self, code):
        """the character, and those of the other case where that does not count"""
        c = chr(code)
        every = {c} | ({c.lower(), c.upper()} | {"s": {"\u017f"}, "k": {"\u212a"}}.get(c.lower(), set())
                       if self.any_case else set())
        if any(len(e) > 1 for e in every) or self.any_case and not c.isascii():
            self.refuse()
        return union(*([(ord(e), ord(e) + 1)] for e in every))

    def character(self):
        c = self.take()
        if c != "\\":
            if c in ".^*+?{":
                self.refuse()
            return self.folded(ord(c))
        c = self.take()
        if c in "sS":
            spaces = table_set(CLASSES, 6)
            return spaces if c == "s" else inverse(spaces)
        if c in "pP":
            name = re.compile(r"\{(\w+)\}").match(self.text, self.at)
            if not name or name[1] not in PROPERTIES:
                self.refuse()
            self.at = name.end()
            found = table_set(*PROPERTIES[name[1]])
            return found if c == "p" else inverse(found)
        if c in ESCAPES:
            return self.folded(ESCAPES[c])
        if c.isalnum():
            self.refuse()
        return self.folded(ord(c))

    def bracket(self):
        negated, out = self.next("^"), []
        if self.ahead("]"):
            self.refuse()
        # of Lu and Lt, and of Lm and Lo, the tables know both together
        for pair in (("\\p{Lu}", "\\p{Lt}", "LuLt"), ("\\p{Lm}", "\\p{Lo}", "LmLo")):
            for a, b in (pair[:2], pair[1::-1]):
                end = self.text.find("]", self.at)
                if a + b in self.text[self.at:end]:
                    self.text = self.text[:self.at] + self.text[self.at:].replace(a + b, f"\\p{{{pair[2]}}}", 1)
        while not self.next("]"):
            if self.next("["):
                if self.text.startswith(":", self.at):
                    self.refuse()
                out.append(self.bracket())
                continue
            if self.ahead("&&") or self.any_case and self.ahead("\\p", "\\P"):
                self.refuse()
            plain = self.text[self.at:self.at + 1] in tuple(".^*+?{$()|")
            first = self.folded(ord(self.take())) if plain else self.character()
            if self.ahead("-&&"):
                self.refuse()
            if self.text.startswith("-", self.at) and self.text[self.at + 1:self.at + 2] not in ("]", ""):
                self.take()
                last = self.character()
                if len(first) > 1 or len(last) > 1 or first[0][1] - first[0][0] > 1 or last[0][1] - last[0][0] > 1:
                    self.refuse()
                first = ((first[0][0], last[0][1]),)
                if first[0][0] >= first[0][1]:
                    self.refuse()
            out.append(first)
        found = union(*out)
        return inverse(found) if negated else found


def nullable(part):
    """may it match nothing?"""
    kind, *what = part
    if kind in ("set", "look"):
        return kind == "look"
    if kind == "repeat":
        return what[1] == 0 or nullable(what[0])
    return (all if kind == "all" else any)(map(nullable, what[0]))


def intersect(a, b):
    return inverse(union(inverse(a), inverse(b)))


def instructions(part, code):
    """appends ("set", runs), ("look", runs) and ("split", to, else to), which what comes behind `part` is next to"""
    kind, *what = part
    if len(code) > 20000:
        raise Refused(LARGE)
    if kind in ("set", "look"):
        code.append(part)
    elif kind == "all":
        for p in what[0]:
            instructions(p, code)
    elif kind == "any":
        ends = []
        for i, p in enumerate(what[0]):
            at = len(code)
            code.append(None)
            instructions(p, code)
            ends.append(len(code))
            code.append(None)
            code[at] = ("split", at + 1, *([len(code)] if i + 1 < len(what[0]) else []))
        for at in ends:
            code[at] = ("split", len(code))
    else:
        p, least, most = what
        for _ in range(least):
            instructions(p, code)
        ends = []
        for _ in range(1 if most is None else most - least):
            ends.append(len(code))
            code.append(None)
            instructions(p, code)
        if most is None:
            code.append(("split", ends[0]))
        for at in ends:
            code[at] = ("split", at + 1, len(code))


def rules_tables(expressions):
    """the classes and automata of regular expressions for tokenizer.h"""
    programs = []
    for expression in expressions:
        programs.append([])
        instructions(Regex(expression).tree, programs[-1])
        programs[-1].append(("match",))
    sets = list({i[1] for p in programs for i in p if i[0] in ("set", "look")})
    bounds = sorted({0, *(b for s in sets for run in s for b in run if b < END)})
    at = [0] * len(sets)
    classes, starts = {}, []  # class of a combination of sets
    for bound in bounds:
        for n, s in enumerate(sets):
            while at[n] < len(s) and s[at[n]][1] <= bound:
                at[n] += 1
        key = frozenset(s for n, s in enumerate(sets) if at[n] < len(s) and s[at[n]][0] <= bound)
        kind = classes.setdefault(key, len(classes))
        if not starts or starts[-1] & 255 != kind:
            starts.append(bound << 8 | kind)
    if len(classes) > 255:
        raise Refused("its regular expressions have too many classes of characters")
    out = [numbers((len(starts), *starts, len(programs)))]
    # what each class, and last the end, is in
    members = [*classes, frozenset(s for s in sets if s and s[-1][1] > END)]
    for program in programs:
        states, table, done = {(): 0, (0,): 1}, [], 0
        while done < len(states):
            state = list(states)[done]
            done += 1
            for kind, member in enumerate(members):
                following, matched = step(program, state, member)
                to = () if kind == len(members) - 1 else following
                table.append(states.setdefault(to, len(states)) << 1 | matched)
            if len(states) > 4000:
                raise Refused(LARGE)
        out += [numbers((len(members), len(states))), struct.pack(f"<{len(table)}H", *table)]
    return b"".join(out)


def step(program, state, member):
    """where the threads of a state, in order of precedence, are behind a character, and whether one has a match before
    it: that ends those that come after"""
    following, seen, stack = [], set(), list(reversed(state))
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        kind, *what = program[i]
        if kind == "match":
            return tuple(dict.fromkeys(following)), 1
        if kind == "split":
            stack += what[::-1]
        elif what[0] in member:
            if kind == "look":
                stack.append(i + 1)
            else:
                following.append(i + 1)
    return tuple(dict.fromkeys(following)), 0
