# ruff: noqa: RUF001 - answers with unicode characters
r"""The built-in `math` reward on many notations of each kind of answer, and their wrong twins.

The tables have the form of tests/support/math_tables.py. The answers of RIGHT and WRONG stand in a
box, those of RIGHT_TEXTS and WRONG_TEXTS are whole responses. All are decided without math-verify.
"""

from __future__ import annotations

import random

import pytest
from math_tables import cases, decision

WORK = "We set up $3x + 4 = 19$.\n\n1. Subtract 4: $3x = 15$.\n2. Divide by 3.\n\n"

RIGHT = r"""
# mixed numbers
13/4 <- 3 1/4
3 1/4 <- 13/4
3.25 <- 3\frac{1}{4}
-\frac{5}{3} <- -1\frac23
\frac{3}{2} <- 1 1/2
1\frac{1}{2} <- \frac{3}{2}
1.5 <- 1\dfrac{1}{2} ;; 1½
\frac32 <- 1 \frac{1}{2}
19/8 <- 2 3/8 inches ;; 2 and 3/8 ;; 2\text{ and }\frac{3}{8}
-2.5 <- -2 1/2
\frac{14}{3} <- 4\ \frac{2}{3}
\frac12 <- 1-1/2
5.75 <- 5\,\tfrac{3}{4}\text{ cups}
100/9 <- 11 1/9
# small and large magnitudes
0.0000002 <- 0.0000002 ;; 2\times10^{-7}
2e-7 <- 2 \cdot 10^{-7}
2^{-99} <- \frac{1}{2^{99}}
0.000000001 <- 10^{-9}
10^{-9} <- 1e-9
602000000000000000000000 <- 6.02\times 10^{23}
# units and currencies
40 <- 40 mph ;; 40 km per hour
12 <- 12 kg ;; 12\ \text{kg}
3.5 <- 3.5 L ;; 3.5 liters
72 <- 72°F ;; 72 °F ;; 72^\circ\text{F}
-40 <- -40°C
30 <- 30 ft² ;; 30\text{ ft}^2 ;; 30 sq. ft. ;; 30 square feet ;; $30 ;; 30$ ;; € 30 ;; 30€
30 <- Rs 30 ;; ₹30 ;; 30 rupees ;; 30 yen ;; ¥30 ;; C$30 ;; 30 pesos ;; CAD 30 ;; 30 cents ;; 30¢
30 <- 30\text{¢}
30.5 <- £30.50
5 <- 5 m/s^2 ;; 5\text{ m/s}^2 ;; 5\ \mathrm{m\,s^{-2}}
9.8 <- 9.8 N
100 <- 100 kWh
5 hours 30 minutes <- 5 hours and 30 minutes
7 <- 7 books ;; 7 more apples ;; 7 students per class
12345 <- 12,345 people ;; 12{,}345\text{ m}
8 <- 8 pm^2
25 <- 25cm² ;; 25 cm³ ;; 25 cubic centimeters ;; 25 cc ;; 25 mL ;; 25 \; \text{mi}
25 <- approximately 25 ;; about 25 minutes ;; 25 min ;; 25\textdollar ;; \text{\$}25
25 <- \text{Rs. }25 ;; 25 points ;; 25\,\Omega ;; 25\ \Omega ;; 25 ohms ;; 25 μm
25 <- 25\ \mu\text{m} ;; 25 rad
1/2 <- 1/2 cup
0.5 <- \frac{1}{2} \text{ mile}
3\pi <- 3π cm
2\sqrt{3} <- 2\sqrt{3}\text{ units}
2\sqrt3 <- 2\sqrt{3} cm
\frac{\pi}{3} <- \frac{\pi}{3} rad ;; \pi/3 radians
45 <- 45 years old
60 <- 60^{\circ} ;; 60 deg ;; 60\,^\circ ;; 60º ;; \angle ABC = 60^\circ
60^\circ <- 60\degree ;; 60\text{ degrees}
# choices
E <- (E) ;; E. none of these ;; \text{(E)} ;; \textbf{E} ;; \text{E: } 5 ;; E - 5 ;; (\text{E})
E <- option e
B <- The correct option is (B)
D <- \mathbf{(D)}\ \frac{1}{2} ;; D.\ 7 ;; D) x + 1
A <- \textbf{(A)}~42 ;; \mathrm{(A) \ }42
(A) <- A.
BC <- B, C
AC <- AC
# inequalities and intervals
(3,\infty) <- x > 3 ;; 3 < x ;; (3, +\infty) ;; \{x \mid x > 3\}
(-\infty,-1)\cup(4,\infty) <- x < -1 or x > 4
x>3 <- x \in (3, \infty)
[0,5] <- 0 \leq t \leq 5
[0,1) <- 0 <= x < 1
0<=x<1 <- [0,1)
x \gt 3 <- (3, \infty)
[3,\infty) <- \{x : x \geq 3\} ;; x≥3 ;; x\geqslant 3
(-\infty,2]\cup[5,\infty) <- x \le 2 \text{ or } x \ge 5 ;; x\in(-\infty,2]\cup[5,\infty)
(-\infty,2]\cup[5,\infty) <- [5,\infty)\cup(-\infty,2]
|x| \le 2 <- -2\le x\le 2
|x| <- \sqrt{x^2} ;; |-x|
|a-b| <- |b-a| ;; \sqrt{(a-b)^2}
(-\infty,2)\cup(2,\infty) <- x \neq 2 ;; \mathbb{R}\setminus\{2\}
(1,2)\cup(3,4) <- (1,2)\text{ or }(3,4)
(-\infty,3) <- (-inf, 3) ;; (-infinity, 3)
(3,5) <- x>3 \text{ and } x<5
[1/2,\infty) <- a \ge \frac{1}{2}
# exponents
25000 <- 2.5e4 ;; 2.5E+4 ;; 2.5\times 10^4 ;; 2.5 x 10^4 ;; 2.5*10**4 ;; 2.5·10⁴
2.5\times10^{4} <- 25000
0.0025 <- 2.5e-3
1000000 <- 10^6
10^6 <- 1e6
1 <- 1.0\times10^{0}
# percent
37.5 <- 37.5\% ;; 37.5 percent ;; 37.5 % ;; 37.5\,\% ;; $37.5\%$
0.375 <- 37.5%
37.5% <- 0.375
37.5\% <- 37.5\text{ percent} ;; \frac{3}{8}
33\frac13 <- 33\frac{1}{3}\%
-12.5 <- -12.5%
1.5 <- 150%
# unicode
3\sqrt{5} <- 3√5
\sqrt{x+1} <- √(x+1)
2 <- ∛8 ;; ½·4
0.75 <- ¾
\frac{2}{3} <- ⅔
2\pi <- 2π
(-\infty,2] <- (−∞, 2]
x^2-1 <- x²−1
x^3 <- x³
-5 <- −5 ;; –5
15 <- 5×3
3 <- 6÷2 ;; log₂8 ;; ⌊3.7⌋
\theta <- θ
\emptyset <- ∅
3\pm\sqrt{2} <- 3 ± √2
\{1,2\} <- {1, 2}
12 <- １２ ;; 2²·3
5' <- 5′
x_1+x_2 <- x₁ + x₂
32 <- 2⁵
\frac{\pi}{2} <- π⁄2
5 <- 5 cm
1000 <- 1 000
yes <- “yes”
x+1 <- 𝑥+1
\mathbb{R} <- ℝ
\infty <- ∞
-\infty <- −∞
|x| <- |x|
\frac{\sqrt{2}}{2} <- √2/2 ;; 1/√2
30 <- ∠A = 30°
\alpha+\beta <- α+β
35 <- 5⋅7
# other boxes and wrappers
42 <- \text{42} ;; \mathrm{42} ;; _42_ ;; \textbf{42} ;; \(42\) ;; \[42\] ;; $$42$$ ;; \{42\}
42 <- {42} ;; \fbox{42} ;; \color{red}{42} ;; \color{red}42 ;; \textcolor{red}{42}
42 <- \underline{42} ;; \large 42 ;; 42\\ ;; 42\; ;; \,42\, ;; \begin{aligned}x=42\end{aligned}
42 <- \text{The answer is 42} ;; Answer: 42 ;; n=42 ;; \mathbf{x=42} ;; '42' ;; 42\text{ (approx)}
42 <- \ensuremath{42} ;; \mbox{42} ;; \bf 42 ;; \bm{42} ;; ~42~ ;; \mathsf{42}
0.5 <- \displaystyle\frac{1}{2}
42! <- 42!
\{1,2\} <- \left\{1,2\right\}
# times of day
3:45 p.m. <- 3:45 PM
3:45 PM <- 3:45 p.m.
3:45 pm <- 3:45\text{ PM} ;; 3:45 ;; 3:45 P.M. ;; 3:45pm
3:45 <- 3:45 ;; 03:45
3 PM <- 3 p.m.
3 pm <- 3:00 pm
noon <- noon
15:45 <- 15:45
2:03:04 <- 2:03:04
# bases
52_8 <- 52_8 ;; 52_{8} ;; (52)_8 ;; 52_{\text{eight}} ;; 52 base 8 ;; 52_{(8)}
52_8 <- 52\text{ (base 8)} ;; 52₈ ;; \text{52}_8 ;; 52 ;; \overline{52}_8
101_2 <- 0b101
13_5 <- 4_5\cdot2_5=8_{10}=13_5
FF_{16} <- FF_{16} ;; ff_{16}
42 <- 42_{10}
# bigl
(1,2) <- \bigl(1,2\bigr) ;; \big(1,2\big) ;; \left(1,2\right)
[1,2) <- \Bigl[1,2\Bigr)
(\frac{1}{2},2) <- \Biggl(\frac12,2\Biggr)
\langle 1,2\rangle <- \left\langle 1,2\right\rangle
[1,2] <- \left[1,2\right]
\{1,2\} <- \bigl\{1,2\bigr\}
|x| <- \left|x\right| ;; \lvert x\rvert
# tildes
5 <- 5~cm ;; x~=~5 ;; 5~\text{m} ;; ~5~
(1,2) <- (1,~2)
# thousands
1234567 <- 1,234,567 ;; 1{,}234{,}567 ;; 1\,234\,567 ;; 1 234 567 ;; 1,\!234,\!567 ;; 1_234_567
1234567 <- 1'234'567
1,234,567 <- 1234567
-1234.5 <- -1,234.50
1234 <- $1,234$ ;; 1~234
1234,567 <- 1234,567
12345 <- 12\;345
# sets, tuples
1,2,3 <- \{3,1,2\} ;; [1, 2, 3] ;; 1, 2, and 3
\{1,2,3\} <- 1, 2, 3
{1,2,3} <- \{1, 2, 3\}
\{2,1\} <- \left\{1,2\right\}
(3,4),(1,2) <- (1, 2), (3, 4)
(1,2),(3,4) <- \{(1,2),(3,4)\} ;; (1,2) and (3,4)
(\frac12,1/3) <- (0.5, \frac{1}{3})
(1,2) <- (x,y)=(1,2) ;; x=1,y=2 ;; x=1,\ y=2 ;; x=1 and y=2 ;; (1;2)
\pm 1 <- {-1, 1}
-1,1 <- \pm 1 ;; -1;1
1,-1 <- x = \pm 1
\pm1 <- 1\text{ and }-1
1,1 <- 1,1
1,2 <- 1, \quad 2 ;; 1\text{ or }2 ;; 1 or 2 ;; x_1=1, x_2=2
\{\} <- \emptyset
\{1,2\} <- A={1,2} ;; S = \{1,2\} ;; x\in\{1,2\} ;; x=1 or x=2
(1,2,3) <- \langle 1,2,3\rangle ;; a=1, b=2, c=3
\begin{pmatrix}1\\2\\3\end{pmatrix} <- (1,2,3)
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&2\\3&4\\\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- [[1,3],[2,4]]^T
P(1+r)^T <- P(r+1)^T
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- A=\begin{pmatrix}1&2\\3&4\end{pmatrix} ;; [[1,2],[3,4]]
\begin{pmatrix}\frac12\\2\end{pmatrix} <- \begin{pmatrix} 0.5 \\ 2 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} <- \left[\begin{array}{c}1\\2\end{array}\right]
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{pmatrix}1\\[4pt]2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{smallmatrix}1\\2\end{smallmatrix}
\begin{pmatrix}1\\2\end{pmatrix} <- \left(\begin{matrix}1\\2\end{matrix}\right)
\begin{pmatrix}1\\2\end{pmatrix} <- \frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}
# plus-minus
2+\sqrt{3},2-\sqrt{3} <- 2\pm\sqrt3
2\pm\sqrt{3} <- 2-\sqrt3, 2+\sqrt3
\frac{1+\sqrt{5}}{2},\frac{1-\sqrt{5}}{2} <- \frac{1\pm\sqrt5}{2}
3i,-3i <- \pm 3i
\pm 3 <- +/- 3
\pm3 <- ±3
# equations
5 <- x=5 ;; 5 = x ;; f(2)=5 ;; x = \frac{5}{1} ;; AB = 5 ;; x=5. ;; x \approx 5 ;; |AB|=5
5 <- \text{Area} = 5 ;; \text{Area}=5\text{ cm}^2 ;; \det A = 5 ;; \overline{AB}=5
x=5 <- 5
y=1+2x <- y = 2x + 1
y=2x+1 <- 2x+1 ;; 2x - y + 1 = 0 ;; y-3=2(x-1)
y^2+x^2=4 <- x^2+y^2=4
x^2+y^2=4 <- x^2+y^2-4=0
2n-1 <- a_n = 2n-1
\frac{x}{2} <- f^{-1}(x)=x/2
7 <- 3+4=7
50 <- \angle B=50^\circ
1/3 <- P(A)=\frac{1}{3}
m=5 <- m = 5
(x-1)^2+(y+2)^2=3^2 <- (x-1)^2+(y+2)^2=9
55 <- S_{10} = 55
\frac12 <- \sin\theta=\frac12
5/2 <- x = 2.50
x^2+1 <- P(x)=x^2+1
9x^2+4y^2=36 <- \frac{x^2}{4}+\frac{y^2}{9}=1
(5,7) <- k=5, n=7
# text
Monday <- \text{Monday} ;; monday
\text{Monday} <- MONDAY
east <- \text{east}
Yes <- Yes.
\text{even} <- \text{even}
\text{ellipse} <- \textit{ellipse}
ellipse <- an ellipse
\text{two lines} <- two lines ;; \text{two\ lines}
\text{DNE} <- DNE
\text{no real solutions} <- no real solutions
St. Louis <- St. Louis
Mary-Ann <- Mary-Ann
neither <- \text{neither}
\text{undefined} <- undefined
false <- False
odd <- \mathrm{odd}
O'Brien <- O'Brien
Friday <- \text{ Friday }
acute triangle <- \text{acute triangle}
red <- red
ABC <- ABC
\triangle ABC <- \triangle ABC
Friday, May 3 <- Friday, May 3
# fractions
\frac{3}{7} <- \tfrac{3}{7} ;; 3/7
3/7 <- \frac37 ;; \frac3{7} ;; \frac{3}7 ;; \cfrac{3}{7} ;; 3\div7 ;; {3 \over 7} ;; \frac{6}{14}
3/7 <- (3)/(7) ;; \sfrac{3}{7} ;; \nicefrac{3}{7} ;; \frac{1}{2}\cdot\frac{6}{7}
3/7 <- \frac{\frac{3}{1}}{7} ;; ^3/_7 ;; 0.428571428571 ;; 0.\overline{428571} ;; \dfrac{3}{7}
3/7 <- \frac{3}{7}. ;; 3 / 7
-3/7 <- \frac{-3}{7} ;; \frac{3}{-7}
\frac{-3}{7} <- -\tfrac37
7 <- 7/1 ;; 14/2
# intervals
x\ne0 <- (-\infty, 0) \cup (0, \infty)
\mathbb{R} <- (-\infty,\infty) ;; \text{all real numbers}
x\le\frac12 <- \left(-\infty,\frac{1}{2}\right]
(-\infty, 2)\cup(3,+\infty) <- (-\infty,2) \cup (3,\infty)
[\frac12,1] <- [0.5,1]
(-1,1)\cup\{2\} <- (-1,1)\cup\{2\}
(1,2) <- ]1,2[
(1,2)\cup(3,4) <- (1,2) U (3,4) ;; (1,2)\bigcup(3,4)
(-\infty,\infty) <- x\in\mathbb{R}
(-1,1) <- -1<x<1
|x|\ge3 <- (-\infty,-3]\cup[3,\infty)
# polynomials
x^2-1 <- (x-1)(x+1)
(x+1)(x-1) <- x^2-1
x^2+2x <- x(x+2)
x-1 <- -(1-x)
x^3+3x^2+3x+1 <- (x+1)^3
2x+2y <- 2(x+y)
a^2-b^2 <- (a-b)(a+b)
2(3r^2-2r-12) <- 6r^2-4r-24
x^2+1 <- x**2+1
xy <- x*y
yx <- x\cdot y
(x-3)(2x+1) <- (2x+1)(x-3)
x+1 <- \frac{x^2-1}{x-1}
\frac{n(n+1)}{2} <- n(n+1)/2 ;; \frac{n^2+n}{2}
(5x^2+6x-5)(5x^2+4x-5) <- (5x^2+4x-5)(5x^2+6x-5)
3x^2 <- 3x^{2}
x^{10} <- x^{10}
2^{n+1} <- 2^{n}\cdot 2
# roots
2\sqrt{3} <- \sqrt{12}
\frac{\sqrt2}{2} <- \sqrt{\frac{1}{2}}
2\sqrt[3]{2} <- \sqrt[3]{16}
2\sqrt3 <- sqrt(12) ;; 2sqrt3 ;; 12^{1/2} ;; 12^0.5 ;; \sqrt{3}\cdot2
\sqrt[3]{3} <- 3^{\frac13}
\sqrt{3} <- \sqrt 3 ;; 1.7320508
1+\sqrt{3} <- \sqrt3+1
\sqrt3 <- \frac{3}{\sqrt{3}} ;; \surd 3
2+\sqrt3 <- \sqrt{7+4\sqrt3}
2 <- cbrt(8)
# logs
3 <- \log_2 8
\frac{\ln 3}{\ln 2} <- \log_{2} 3
3\ln 2 <- \ln 8
2 <- \log 100
\log 2 <- \log_{10} 2
\log_{10}2 <- \lg 2
\ln 2 <- ln(2)
-\ln 2 <- \ln\frac12
\log_2 3 <- log_2(3)
\log_2 6 <- 1+\log_2 3
e^{2} <- e^2
e^2 <- \exp(2)
\ln |x| <- \ln|x|
\frac{\log b}{\log a} <- \log_a b
# complex
4i+3 <- 3+4i
\frac12+\frac12i <- \frac{1+i}{2}
-i <- -i
i <- e^{i\pi/2} ;; \mathrm{i}
-1 <- i^2
1+i\sqrt3 <- 2\left(\cos 60^\circ+i\sin 60^\circ\right)
1+\sqrt3 i <- 2 \operatorname{cis} 60^\circ
2i <- \sqrt{-4}
1+2i,1-2i <- 1\pm 2i
2 <- (1+i)(1-i)
# mod classes
3\pmod{7} <- 3\pmod 7 ;; x\equiv 3\pmod 7 ;; 3
3 \pmod{7} <- 3 (mod 7)
3\pmod7 <- 3 mod 7
x\equiv3\pmod{7} <- x \equiv 3 \mod 7
n\equiv3\pmod{7} <- n\equiv 3 \bmod 7
3 <- 3 \pmod 7
# dates, time
May 3, 2024 <- May 3, 2024
\text{May 3} <- May 3
3/14/2015 <- 3/14/2015
2024-05-03 <- 2024-05-03
monday <- Monday
August 14 <- \text{August 14} ;; 14 August ;; August 14th
# ratio
3:4 <- 3:4 ;; 3 : 4 ;; 3\colon4 ;; \frac{3}{4} ;; 3/4 ;; 3 to 4 ;; 3\text{ to }4 ;; 6:8 ;; 3∶4
3:4 <- 3\,:\,4
\frac{3}{4} <- 3:4
1:2:3 <- 1:2:3
\sqrt2:1 <- \sqrt{2}:1
# repeating
\frac{3}{11} <- 0.\overline{27}
\frac13 <- 0.\bar{3}
1/6 <- 0.1\overline{6} ;; 0.1(6) ;; 0.1\bar 6
0.\overline{27} <- \frac{3}{11}
1/3 <- 0.333... ;; 0.333\ldots ;; 0.\dot{3} ;; 0.(3) ;; 0.333…
3/11 <- 0.2727...
0.\bar{3} <- 0.\overline{3}
\frac{2}{11} <- 0.\dot{1}\dot{8}
7/3 <- 2.\overline{3}
2 <- 1.999...
# factor forms
72 <- 2^3 \cdot 3^2 ;; 2^3\times3^2
2^3\cdot3^2 <- 72
3628800 <- 10!
10 <- \binom52 ;; {5 \choose 2}
60 <- 5\cdot4\cdot3
2^{100} <- 2^{100}
252 <- \frac{10!}{5!5!}
6 <- 1+2+3
20 <- \dbinom{6}{3}
1023 <- 2^{10}-1
# other boxes & text around
C <- \text{C} ;; \textbf{(C) }12 ;; \mathbf{C} ;; (C)\ 12 ;; \mathrm{C}) ;; \text{Choice C}
C <- C: x=3
2.5 <- \dfrac{5}{2} ;; \frac 5 2 ;; \frac{5}{2}\text{ cm} ;; \frac{5}{2}~\text{cm}^2
5.5 <- \$5.50 ;; \text{\$}5.50 ;; 5.50\text{ dollars} ;; 5.50 \$ ;; \text{€}5.50 ;; 5.50 €
5,50 <- 5,50
[5,\infty) <- \{x\in\mathbb{R}\mid x\ge 5\} ;; x \ge 5, x\in\mathbb{R} ;; [5, +\infty[
(-\infty,-1]\cup[2,\infty) <- x \leqslant -1 \text{ or } x \geqslant 2
(-\infty,-1]\cup[2,\infty) <- (-\infty,-1]\bigcup[2,\infty) ;; (-∞,-1]∪[2,∞)
(-\infty,-1]\cup[2,\infty) <- x\in(-\infty,-1]\cup[2,+\infty)
(-1,2) <- -1 < x \text{ and } x < 2 ;; 2>x>-1
(-2,2) <- |x|<2
(0,\frac{\pi}{2}) <- 0<x<\frac{\pi}{2}
(-\infty,-2)\cup(-2,3)\cup(3,\infty) <- x\neq -2, 3 ;; x \ne -2 \text{ and } x \ne 3
(-\infty,-2)\cup(-2,3)\cup(3,\infty) <- \mathbb{R} \setminus \{-2, 3\}
(-\infty,2)\cup(2,\infty) <- \text{all real numbers except } 2
\mathbb{R} <- \text{All real numbers}
[0,\infty) <- y\ge 0
(\frac14,\infty) <- k > \frac{1}{4}
[-1,1] <- m \in [-1,1] ;; -1\leq m\leq1
# numbers
1/2 <- 0.5 ;; \sin\frac{\pi}{6} ;; \sin(30°)
\frac{1}{2} <- .5
50% <- 1/2
3 <- +3 ;; 3.0 ;; 3. ;; 03 ;; \frac{\log 8}{\log 2}
3.0 <- 3
003 <- 3
10^6 <- 1,000,000 ;; 1\text{ million}
1000000 <- 1 million ;; 1 million dollars ;; 1.0 million people
2500000000 <- 2.5\text{ billion}
0 <- -0 ;; \frac{0}{5}
2.5 <- \frac{10}{4}
\frac{5}{2} <- 2.50
5 <- \sqrt{25} ;; 5^1 ;; \frac{\sqrt{50}}{\sqrt{2}} ;; |-5| ;; -(-5) ;; (5) ;; [5] ;; 5 + 0
5 <- \cos 0 \cdot 5 ;; \text{exactly } 5 ;; 5 \text{ ways} ;; 5\text{ different colors}
5 <- 5^{\text{th}} ;; 5^{th}
1 <- \tan 45^\circ
\frac{\pi}{4} <- \arctan 1
\frac{\pi}{3} <- \cos^{-1}\frac12
e <- e ;; \mathrm e
e^2 <- \mathrm{e}^2
2i <- 2\,\mathrm{i}
i <- \sqrt{-1}
2 <- \log_{3}{9} ;; \log_3(9)
\log 9 <- 2\log 3
\ln(2) <- \ln{2}
120 <- \binom{10}{3} ;; {10\choose 3} ;; 10\times 12 ;; 10*12 ;; 10 \cdot 12 ;; 10×12 ;; (10)(12)
120 <- 5 \cdot 4! ;; \dfrac{6!}{3!} ;; 2^3\cdot3\cdot5 ;; 2^{3} * 3 * 5
3/2 <- 1+\frac12 ;; 1.5\text{ or }\frac{3}{2} ;; \frac{3}{2} = 1.5 ;; 1.5 \text{ (exact)}
1.5 <- \frac{3}{2}=1\frac{1}{2} ;; \frac{3}{2}\approx1.5
\sqrt2 <- \sqrt2\approx1.414
x^2+2x+1 <- x^2 + 2x + 1
5:00 p.m. <- 5:00 PM ;; 17:00
5:00 <- 5{:}00 ;; 5\!:\!00 ;; 5\text{:}00
1st <- \text{1st} ;; 1
21 <- 21st
five <- \text{Five}
1,2,3 <- a=1,b=2,c=3
(1,2,3) <- (a,b,c)=(1,2,3)
(3,2,1),(1,2,3) <- (1,2,3)\text{ and }(3,2,1)
\{(2,1),(1,2)\} <- \{(1,2),(2,1)\}
(1,2),(-1,-2) <- (-1,-2),\ (1,2)
1,-3 <- x_1=1,\ x_2=-3
-3,1 <- x = 1, -3 ;; x=1\quad\text{or}\quad x=-3 ;; x=1\text{, }x=-3 ;; x=1\ \&\ x=-3 ;; 1;-3
-3,1 <- -1\pm2
(1,2) <- \begin{cases}x=1\\y=2\end{cases} ;; \vec{v}=(1,2) ;; \overrightarrow{AB}=(1,2) ;; A(1,2)
(1,2) <- P=(1,2)
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{array}{c}1\\2\end{array}
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{Bmatrix}1\\2\end{Bmatrix} ;; \langle1,2\rangle
\begin{pmatrix}1.0\\2\end{pmatrix} <- \begin{pmatrix}1\\2\end{pmatrix}
\mathbf{i}+2\mathbf{j} <- \mathbf{i}+2\mathbf{j}
(0.5,-3) <- \left(\frac{1}{2},-3\right)
\left(\frac{1}{2},-3\right) <- ( 0.5 , -3 )
x+2y=6 <- y = -\frac{1}{2}x + 3 ;; x+2y-6=0 ;; 2x+4y=12
x^2-2x+y^2=3 <- (x-1)^2+y^2=4
2x+1 <- f(x)=2x+1 ;; x\mapsto 2x+1
y=2x+1 <- f(x)=2x+1
f(x)=2x+1 <- 2x+1
2x <- f'(x)=2x ;; \frac{dy}{dx}=2x
2n+1 <- a_n=2n+1
x^2+x <- x(x+1) ;; x\left(x+1\right) ;; (x+1)x
x^2+2x <- (x + 1)^2 - 1
(x+1)^{-1} <- \frac{1}{x+1}
x^{1/2} <- \sqrt{x}
\sqrt x <- x^{\frac{1}{2}}
e^{x+2} <- e^{x}\cdot e^{2}
2\ln x <- \ln x^2
2\sin x\cos x <- \sin 2x
\cos^2 x <- 1-\sin^2x
\frac{\sin x}{\cos x} <- \tan x
x^2+C <- x^2+C ;; x^2+c
3 \pmod 7 <- n\equiv 3\pmod{7}
3\pmod{7} <- 3 \bmod 7
7k+3 <- n = 7k+3
x\equiv 3 \pmod 7 <- 3
1/6 <- 0.1\overline{6} ;; 0.166\ldots ;; 0.1666\dots
16/99 <- 0.\overline{16}
22/7 <- 3.\overline{142857}
3:4:5 <- 3:4:5
3:4 <- 3\text{ : }4 ;; \frac34 ;; 9:12 ;; 3\!:\!4 ;; \text{3 to 4}
March 14, 2023 <- March 14, 2023 ;; 14 March 2023
March 14th <- \text{March 14}
March 14 <- Mar 14 ;; Tuesday, March 14
2 hours and 30 minutes <- \text{2 hours 30 minutes}
2 hours 30 minutes <- 2 h 30 min
5'3'' <- 5'3''
5 feet 3 inches <- 5 ft 3 in
1101_{2} <- 1101_2
1101_2 <- 1101_{\mathrm{two}} ;; 1101_{(2)} ;; (1101)_2 ;; 1101\text{ base }2
1101_2 <- 1101\text{ in base 2} ;; 1101_\text{two} ;; [1101]_2 ;; 0b1101 ;; \texttt{1101}_2
1101_2 <- 1\,101_2
A3_{12} <- A3_{12} ;; a3_{12}
AB_{16} <- AB_{16} ;; \text{AB}_{16}
0.0000005 <- 5\cdot10^{-7} ;; 5 * 10^-7 ;; 5\times{10}^{-7} ;; \frac{1}{2\cdot10^6}
5\times10^{-7} <- 5e-7
5e-7 <- 5 \times 10^{-7}\text{ m}
30 <- 30\degree ;; 30^o ;; 30^{o} ;; 30\deg ;; 30^\circ\text{C} ;; 30 °C ;; 30 degrees Celsius
30 <- \angle A=30^\circ ;; \theta=30^\circ ;; m\angle A=30
-30 <- -30^\circ
30^\circ, 150^\circ <- 30°, 150°
\frac{\pi}{6} <- \frac{\pi}{6}\text{ rad}
22.5 <- 22.5^{\circ}
# more notations
A, B <- \text{(A) and (B)}
A,B <- A, B
AB <- A,B ;; \text{A and B}
x^2+C <- x^2+k
\frac{1}{3}x^3+C <- \frac{x^3}{3}+c
5/6 <- 1/2 + 1/3 ;; \frac{5}{6}\text{ of the cake} ;; 5/6 of the cake
5 <- \text{about }5 ;; \sim 5 ;; ≈5 ;; \text{approximately }5 ;; 5\quad\blacksquare ;; 5\tag{1}
5 <- \phantom{0}5 ;; 5\phantom{0} ;; \!5 ;; \mathstrut 5 ;; {5} ;; {{5}} ;; \{5\}
5 <- \left(5\right) ;; \quad5\quad ;; 5 ;; \#5 ;; \text{Answer}=5 ;; \text{Total: }5
5 <- \text{Final Answer: }5 ;; \therefore 5 ;; \Rightarrow 5 ;; = 5 ;; \implies x=5 ;; 5,
5 <- **x = 5** ;; $x=5$ ;; $$5$$ ;; \(x=5\) ;; *5* ;; "5" ;; ‘5’ ;; ５ ;; 5️ ;; 𝟓 ;; ⑤
3 m 20 cm <- 3\text{ m }20\text{ cm}
(1,2] <- (1,2] ;; (1, 2 ] ;; \left(1,2\right] ;; 1<x\le2 ;; \{x|1<x\le2\} ;; ]1,2]
90 <- 90\text{ km/hr} ;; 90 km h^{-1} ;; 90\,\mathrm{km}\,\mathrm{h}^{-1} ;; 90 km·h⁻¹
90 <- 90\frac{\text{km}}{\text{h}} ;; 90\ \text{km}/\text{h} ;; 90\text{ kg}\cdot\text{m}^2
90 <- 90\mathrm{~cm}^{2} ;; 90 \mathrm{~cm} ;; 90\mathrm{cm} ;; 90\operatorname{cm}
90 <- 90\:\text{cm} ;; 90\hspace{2pt}cm ;; 90\mbox{ cm} ;; 90\rm{cm} ;; 90 {\rm cm} ;; 90\%
90 <- 90 \text{ %} ;; 90\text{\%} ;; 90\textnormal{ cm} ;; 90\textrm{ cm} ;; 90\textit{ cm}
90 <- 90\text{cm}^\text{2} ;; 90\text{ square cm} ;; 90\text{ sq cm} ;; 90\text{ cm squared}
90 <- 90 centimeters squared ;; 90\text{ cubic feet} ;; 90\text{ units}^2 ;; 90 \text{ (units)}
90 <- 90 bottles of milk ;; 90\text{ gallons/minute} ;; \text{\textdollar}90 ;; \text{USD }90
90 <- 90 \text{ US dollars} ;; US\$90 ;; A\$90 ;; Rs. 90 ;; 90 Rs ;; 90 euro ;; 90 pence ;; £90
90 <- \pounds 90 ;; \text{£}90 ;; \yen 90 ;; 90\text{ yuan} ;; ₩90 ;; ฿90 ;; ₽90 ;; 90 元 ;; 90人
90 <- 90度 ;; 90
€90,00 <- €90,00
90p <- 90p
\frac{\pi}{2} <- \dfrac{\pi}{2}\text{ radians} ;; \frac\pi2 ;; \pi/2 ;; \frac12\pi ;; 0.5\pi
\frac{\pi}{2} <- \frac{\pi}{2}\approx1.57
(-\infty,3) <- -\infty<x<3 ;; x\in(-\infty;3) ;; (-\infty;3) ;; (−∞; 3) ;; x \lt 3
x\ne 3 <- x \not= 3
[3,\infty) <- 3\le x ;; 3\leqq x ;; x\geqq3 ;; x ⩾ 3
x >= 3 <- [3,\infty)
2\sqrt2 <- 2^{\frac{3}{2}} ;; \sqrt[4]{64} ;; \sqrt{8} ;; 2*sqrt(2) ;; 2 \sqrt 2 ;; 2 √2 ;; 2√(2)
2\sqrt2 <- 2\cdot2^{0.5} ;; \frac{4}{\sqrt{2}} ;; 4/√2 ;; \sqrt{2}+\sqrt{2} ;; 2.828427124746
\frac{\sqrt5-1}{2} <- \frac{-1+\sqrt{5}}{2} ;; (\sqrt{5}-1)/2 ;; \frac{\sqrt5}{2}-\frac12
\frac{\sqrt5-1}{2} <- \frac{2}{1+\sqrt5} ;; 2\sin18^\circ
1-i <- 1-i ;; -i+1 ;; \sqrt2 e^{-i\pi/4} ;; \frac{2}{1+i} ;; 1+(-1)i ;; 1 - 1i
(1,-1) <- (1,-1)
1000 <- 1\,000
1.000,00 <- 1.000,00
10000 <- 10{,}000 ;; \text{10,000} ;; 10,000.00 ;; 10 thousand
ten thousand <- \text{ten thousand}
10,000 <- 10^4 ;; 1e4
\text{no real solution} <- \text{no real solution}
does not exist <- \text{does not exist}
\text{does not exist} <- \text{Does Not Exist}
No <- \textbf{No} ;; no
yes <- YES
Yes <- \text{``Yes''} ;; ``Yes''
set of even numbers <- \text{the set of even numbers}
Paris, France <- \text{Paris, France}
north-east <- \text{north-east}
\text{Alice} <- Alice
Alice <- \text{Alice.} ;; \emph{Alice} ;; \textsc{Alice}
5% <- 5%
No. 5 <- No. 5
# approximations, fractions in words
6/7 <- \frac{6}{7} \text{ or approximately } 0.857 ;; \frac67\ (\approx 0.8571) ;; 6 out of 7
6/7 <- 6 over 7 ;; ⁶⁄₇ ;; \text{six sevenths} ;; \frac{6}{7}\text{ (approximately 0.857)}
\sqrt{13} <- \sqrt{13} \text{ (approximately } 3.61\text{)} ;; \sqrt{13}, about 3.606
0.74 <- \frac{37}{50} \text{ (or } 0.74)
-\frac{39}{19} <- -2\text{ and }\frac{1}{19}
\frac{17}{50} <- 17:50
45/1024 <- 45/1,024 ;; \frac{45}{1,024}
7 <- \text{seven} ;; only 7 ;; \text{There are } 7 \text{ ways.} ;; \text{The number of ways is } 7
7 <- \text{the number }7 ;; \to 7 ;; \text{Total cost} = 7 ;; 3 \,\#\, 4 = 7 ;; P(X \ge 2) = 7
7 <- 7 /hour ;; 7\text{ \$/hour} ;; 7 \ (\text{gallons}) ;; 7 gallon(s) ;; 7 \text{.}
# layout
33800 <- 33\text{,}800 ;; 33\mathpunct{,}800 ;; \num{33800} ;; \SI{33800}{\cm} ;; \qty{33800}{m}
33800 <- 33800 \quad \square ;; \left. 33800 \right. ;; 33800\hfill ;; 33800\qed ;; \mathop{33800}
33800 <- \begin{array}{c} 33800 \end{array} ;; 33800\tag{1} ;; \small 33800
-25 <- {-}25
\frac{\sqrt{65}}{9} <- \underline{\frac{\sqrt{65}}{9}} ;; \text{$\frac{\sqrt{65}}{9}$}
30^\circ <- 30^\degree ;; 30^{\degree} ;; 30^\text{o} ;; \ang{30} ;; 30\textsuperscript{o}
30^\circ <- \text{30 degrees} ;; 30^{\circ}\text{ (degrees)}
\begin{pmatrix}7\\-1\end{pmatrix} <- \begin{aligned} \begin{pmatrix}7\\-1\end{pmatrix} \end{aligned}
# vectors, intervals, lists
\begin{pmatrix}7\\-1\end{pmatrix} <- (7,-1)^T ;; [7, -1]^{\top}
\begin{pmatrix}7\\-1\end{pmatrix} <- -\begin{pmatrix}-7\\1\end{pmatrix}
\begin{pmatrix}7\\-1\end{pmatrix} <- x=7, y=-1 ;; \left[\begin{matrix}7\\-1\end{matrix}\right]
(4,1) <- <4, 1> ;; \text{the point } (4,1) ;; \begin{cases} x &= 4 \\ y &= 1 \end{cases}
(4,1) <- (8/2,1)=(4,1)
(3,5] <- \text{all } x \text{ such that } 3<x\le 5 ;; \text{the interval } (3,5] ;; \left]3;5\right]
(3,5] <- \text{Domain: }(3,5] ;; \text{all real numbers } 3<x\le 5 ;; g(x) \in (3,5]
(-\infty,2)\cup[3,4] <- ]-\infty,2[ \cup [3,4]
(-\infty,0)\cup(0,\infty) <- x\in\mathbb{R},\ x\ne0
1,2 <- \text{The solutions are } 1 \text{ and } 2
p=2, q=3 <- q=3, p=2 ;; 2, 3 ;; p=2 \text{ and } q=3
no solution <- \emptyset ;; There are no solutions
red, blue <- \text{red}, \text{blue}
# bases, choices, times, money
52_8 <- 52_{\text{base } 8} ;; {52}_8 ;; 52_8 = 42_{10} ;; 42 = 52_8
B <- \text{Answer choice B} ;; \text{Statement B} ;; \text{B (12)}
8:34 p.m. <- 8:34 in the evening
3.54 <- 3 dollars and 54 cents
# chains, factorials and binomials of variables
(a+5)(b+2) <- ab+5b+2a+10 = (a+5)(b+2)
\frac{n!}{2^n} <- n!/2^n ;; \frac{n!}{2^{n}}
\binom{n}{2} <- \frac{n(n-1)}{2} ;; _nC_2 ;; {n \choose 2}
y=2x-13 <- \text{The equation is } y = 2x - 13
x+y+z=0 <- z = -x-y ;; 2x+2y+2z=0
7 <- a+b=7 ;; AB-CD=7\text{ cm}
a+b=7 <- b=7-a
(2,-3) <- y=-3, x=2
(3,5) <- m=3, n=5
\frac{\pi}{4}+n\pi, n\in\mathbb{Z} <- n\pi+\frac{\pi}{4},\ n\in\mathbb{Z}
\frac{\pi}{4}+n\pi, n\in\mathbb{Z} <- x = \frac{\pi}{4} + k\pi \text{ for } k \in \mathbb{Z}
\frac{\pi}{4}+n\pi, n\in\mathbb{Z} <- \frac{\pi}{4}+k\pi, \text{where } k \text{ is an integer}
3/4 <- 0.75 (3/4) ;; \frac{3}{4} (0.75)
-1,3 <- (-1,3)
"""
WRONG = r"""
3/8 <- 2 and 3/8
2 <- 2 and 3/8
13/5 <- 3 1/4
3/4 <- 3 1/4 ;; 3\frac{1}{4}
3 1/4 <- 31/4
31/4 <- 3\frac14
-1/2 <- -1 1/2
0.0000002 <- 0.0000003
2e-8 <- 3e-8
1e-12 <- 0
2^{-99} <- \frac{1}{2^{97}}
1 <- 1.0000000001 ;; 1,234 ;; \pm 1
10^{-8} <- 10^{-7}
1000000000000 <- 1000000000001
6.02\times10^{23} <- 6.02\times 10^{22}
25 <- 26 cm^2 ;; 25 x ;; 25k ;; 25 million ;; 2500 cents ;; 24.99 dollars ;; -25 cm
25 <- 25\sqrt{2}\text{ cm} ;; 25 dozen ;; 25\pi\text{ cm} ;; 25 cm, 26 cm ;; 25 squared ;; 25 ab
25 <- 25 or 26 apples ;; 2⁵
2 <- 25 cm^2 ;; ½ ;; y=2x
60 <- 61° ;; 60\pi ;; \angle ABC = 61^\circ
E <- (A) ;; A) E ;; A or E ;; (A), (E) ;; AE ;; not E ;; \textbf{(A)}\ 12
ABC <- ACB ;; BAC
C <- 12
(-\infty,3) <- x > 3 ;; (-\infty;3]
(3,\infty) <- x >= 3 ;; [3,\infty]
[3,5] <- 3 < x < 5
3 <- x < 3 ;; x \ne 3 ;; \log_2 9
[3,5) <- (3,5)
(-\infty,2) <- (-\infty,2]
(-\infty,-1)\cup(4,\infty) <- x < -1 ;; (-1,4)
x = 3 <- x > 3
(-\infty,3)\cup(5,\infty) <- x>3 and x<5
25000 <- 2.5e5 ;; 2.5e-4 ;; 2.5\times 10^{-4} ;; 25e4
2.5e4 <- 2.5
37.5 <- 37.6%
0.375 <- 3.75%
3.75 <- 37.5%
1.01 <- 1%
50 <- 0.5%
\sqrt{2} <- √3
(1,\infty) <- [1,∞)
x^2 <- x³ ;; x^3 ;; x^2 x
\sqrt{8} <- ∛8
\sqrt[3]{5} <- 3√5
3.14 <- π
3/5 <- ¾
22 <- 2²
3:45 a.m. <- 3:45 PM
3:45 p.m. <- 3:46 PM
3 am <- 3 pm
3:45 <- 4:45 ;; 3.45
345 <- 3:45
12:00 pm <- 12:00 am
52_8 <- 52_9 ;; 53_8 ;; 42 ;; 52_{10} ;; (52)_7 ;; 52 base 9
52 <- 52_8
FF_{16} <- FE_{16}
(1,2) <- \bigl(2,1\bigr) ;; \bigl[1,2\bigr] ;; (2,1) ;; x=2,y=1 ;; [1,2] ;; A(2,1)
(1,2) <- \begin{cases}x=2\\y=1\end{cases}
12346 <- 12,345
123 <- 1,23
1234 <- 12,34 ;; 1.234 ;; (1,234)
1234568 <- 1,234,567
\{1,2,3\} <- \{1,2\} ;; \{1,2,3,4\}
1,2,2 <- 1,1,2
(1,2),(3,4) <- (1,2),(4,3)
(2,1) <- 1,2
\pm1 <- 1
\{1,2\} <- {1}
1,2 <- 1 or 2 or 3
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&2\\3&5\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{pmatrix}2\\1\end{pmatrix} ;; (2,1)
2\pm\sqrt{3} <- 2+\sqrt3 ;; 3\pm\sqrt2
\pm 3 <- \pm 4
5 <- x=6 ;; 5=6 ;; x=5, x=6 ;; x=y ;; 5/6 ;; \text{either 5 or 6} ;; 5, 6, 7 ;; 4<x<6
5 <- \approx 5.1 ;; 5 \pm 1 ;; 5+ ;; >5 ;; x=5 \text{ and } x=6 ;; \{5,6\} ;; 55 ;; 5.5
5 <- 5\sqrt{1.1} ;; -5 ;; 5! ;; 5^2 ;; \frac{1}{5} ;; 5i ;; 5e ;; 5\pi ;; 5k ;; 5n ;; 5a
5 <- 5 \text{ hundred} ;; 5\text{ dozen} ;; 5 thousand dollars ;; 5{,}000 ;; 5\cdot 10^3
5 <- 5\text{ squared} ;; 5 tenths ;; 5 (or 6) ;; 5, maybe 6 ;; 5 \text{ vs } 6 ;; 5 \vee 6
5 <- 5 \lor x=6 ;; 5 \& 6 ;; 5\\6 ;; 5\quad 6 ;; 5 6 ;; [5,6] ;; 5\Rightarrow6 ;; 5\ne6 ;; 5<6
5 <- 5\cup6 ;; 5/6 of the cake
6 <- x=5 ;; 5\text{ or }6 ;; 5 (or 6) ;; maybe 5 ;; 5;6 ;; 5\approx 6 ;; 5=6
y=2x+1 <- y=2x-1 ;; 2x+1=0
x^2+y^2=4 <- x^2+y^2=2 ;; 4
7 <- 3+4=8
x = 2 <- y = 2
n=7 <- m=5
Monday <- \text{Tuesday} ;; Mon
even <- not even ;; even or odd ;; uneven
Yes <- Yes or No
silent <- listen
0 <- no solution
red <- red, blue
two lines <- lines two
none <- infinitely many
3/7 <- \frac{7}{3} ;; \frac{3}{8} ;; 0.43 ;; 0.428 ;; 3\frac{3}{7} ;; 37 ;; \frac{3}{7}x
-3/7 <- \frac{3}{7}
3/8 <- 0.428572
\mathbb{R} <- (-\infty,0)
(-\infty,2)\cup(3,\infty) <- (2,3)
(1,2)\cup(3,4) <- (1,2)\cup(3,5) ;; (1,2),(3,4)
-\infty <- \infty
42 <- \infty
x^2-1 <- (x-1)(x-1)
(x+1)(x-1) <- x^2+1
x(x+1) <- x^2+2x
x^2+1 <- (x+1)^2
2x+2y <- 2x+y
b-a <- a-b
2x <- 2y
x^2-y <- x^2-1
\frac{n(n+1)}{2} <- n(n-1)/2
2\sqrt{3} <- \sqrt{13} ;; 3\sqrt{2}
\sqrt3 <- \sqrt[3]{3}
2\sqrt3 <- 2\sqrt[3]{3} ;; 3.46 ;; -2\sqrt3 ;; 12 ;; \sqrt{2}3
\log_{10} 2 <- \ln 2
\log_2 3 <- \log_3 2
3\ln 2 <- \ln 9
e^2 <- e^3
3+4i <- 3-4i ;; 4+3i ;; 7i ;; 5
-i <- i
3\pmod{7} <- 4\pmod 7 ;; 3\pmod 8
May 3, 2024 <- May 4, 2024 ;; May 3, 2025
May 3 <- June 3
3/14/2015 <- 3/15/2015
3:4 <- 4:3 ;; 3:5 ;; 34 ;; 3 ;; 9:13
1:2:3 <- 1:3:2
\frac{3}{11} <- 0.\overline{28} ;; 0.27
1/3 <- 0.33 ;; 0.(4)
0.3 <- 0.\overline{3}
0.\overline{3} <- 0.3
3628800 <- 9!
2^{100} <- 2^{101}
2^3\cdot3^2 <- 71
20 <- \binom53
5^2 <- 5^\circ
five <- \text{five or six} ;; \text{Six}
25x <- 5x=25
500 <- 5\%
(-\infty,-2)\cup(-2,3)\cup(3,\infty) <- x\neq -2
[-2,2] <- |x|<2
(-2,2) <- |x|>2
(5,\infty) <- x\ge5
(-\infty,-1]\cup[2,\infty) <- (-\infty,-1)\cup[2,\infty)
[5,\infty) <- x\in\{5\}
(-1,2) <- -1 < x \text{ or } x < 2
(-\infty,2)\cup(2,\infty) <- \text{all real numbers except } 3
March 14 <- March 15
March 14, 2023 <- 14 April 2023 ;; March 14, 2024
2 hours 30 minutes <- 2 h 31 min
5 feet 3 inches <- 5 ft 4 in
5:00 p.m. <- 16:00
17:00 <- 5:00 a.m.
1101_2 <- 1101_3 ;; 1111_2 ;; 13
A3_{12} <- A4_{12}
30 <- 31^\circ ;; 30\pi
30,150 <- 30^\circ, 160^\circ
x+2y=6 <- y = \frac{1}{2}x + 3 ;; x+2y=7 ;; x+2y
(1,2),(2,1) <- (1,2),(1,2)
2\sin x\cos x <- 2\cos x\sin 2x
x^2+x <- x^2+x+1
2\ln x <- \ln x
5e-7 <- 5e-8 ;; 5.1e-7 ;; 0
1/6 <- 0.16 ;; 0.167
16/99 <- 0.\overline{61}
3\pmod 7 <- n\equiv 4\pmod 7
7k+3 <- 7k+4 ;; 7k-3
21 <- 1st
b+c <- b+k
A <- \text{A or B} ;; \text{(A)/(B)}
B <- A/B
90 <- 90 km/hr or 80
1000 <- 1.000
10 <- 10 thousand
2.8284 <- 2\sqrt{2}
1-i <- 1+i ;; -1-i
(1,2] <- (1,2)
yes <- \text{no}
does not exist <- \text{exists}
2x+3y=6 <- 6
p=2, q=3 <- p=3, q=2 ;; 3, 2 ;; (3,2) ;; p=2 ;; p=2, q=3, r=1
AB=9, CD=4 <- AB=4, CD=9
\frac{n!}{2^n} <- \frac{n!}{2^{n+1}} ;; \frac{(n+1)!}{2^n}
\binom{n}{2} <- \frac{n(n+1)}{2} ;; \binom{n+1}{2}
5/6 <- \frac{5}{6} or approximately 6.5 ;; 5 in 7 ;; six fifths
7 <- \text{The answer is not } 7 ;; \text{It is either } 7 \text{ or } 8 ;; eight ;; 7? ;; 8 in 7
52_8 <- 53_8 = 43_{10}
B <- B (A)
3.54 <- 3 dollars and 55 cents
8:34 p.m. <- 8:34 in the morning
\sqrt{13} <- \sqrt{13}\text{ or }4 ;; \sqrt{14} (\approx 3.74)
\begin{pmatrix}7\\-1\end{pmatrix} <- (-1,7)^T ;; x=-1,y=7 ;; \begin{pmatrix}-7\\1\end{pmatrix}
(a+5)(b+2) <- ab+5b+2a+10 = (a+2)(b+5)
(4,1) <- (8/2,1)=(4,2) ;; <1, 4>
30^\circ <- \ang{31}
x+y+z=0 <- x+y-z+1=0 ;; 0 ;; x-y=0
7 <- a+b=8 ;; a+b=c
a+b=7 <- a-b=7 ;; 7
(2,-3) <- y=2, x=-3
(3,5) <- m=5, n=3
3/4 <- 0.75 (1/4)
\frac{\pi}{4}+n\pi, n\in\mathbb{Z} <- \frac{\pi}{4}+2k\pi, k\in\mathbb{Z} ;; \frac{\pi}{4}
-1,3 <- -1<x<3
33800 <- 33\text{,}801
|x| <- x ;; -x
x <- |x|
|x-3| <- 3-x ;; x-3
|a-b| <- b-a
|x|+|y|=1 <- x+y=1
P(1+r)^T <- P(1+r)
1+r <- (1+r)^T
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- [[1,2],[3,4]]^T
\begin{pmatrix}1\\2\end{pmatrix} <- \left[\begin{array}{c}1\\2\end{array}\right]^T
7/2 <- 3, 1/2 ;; \{3, \frac{1}{2}\} ;; -3 and 1/2
5 <- 5 \text{ sixths} ;; 5 \text{ less than twelve} ;; 5 \text{ tens} ;; 5 \text{ below zero}
"""
RIGHT_TEXTS = r"""
# calculations in the last sentence
540 <- So, Sunny earned $150 + $390 = $540 for two days.
120 <- So he makes 60*2=$120 in 2 weeks ;; So he makes 60 * 2 = 120 dollars in 2 weeks.
440 <- All together, he will make $320+$120=$440 for the day.
5 <- So on Tuesday 4 inches + 1 = 5 inches ;; It falls to 50 minutes / 10 = 5 minutes.
2 <- Thus, the vendor sold each for $100/$50 = $2 each. ;; So it is $5 - $3 = $2.
18000 <- The annual payment is $1500/month * 12 months/year = $18,000/year
9500 <- So, it is $409 500 - $400 000 = $9500 more than the budget.
8 <- It takes 1 + 3 + 1/2 + 1 1/2 + 2 = 8 hours in all.
11232 <- The total cost will be $864 + $2,592 + $432 + $7,344 = $11,232.
25% <- The difference of both is 50% - 25% = 25%.
12 <- Thus, Clyde will pay $6.50 + $5.50 = $12 for 5 apples and 5 oranges.
# thinking
4 <- <think>¶Is it \boxed{3}? yes</think>¶¶\boxed{4}
3.5 <- reasoning </think> The answer is $\frac{7}{2}$.
# mixed numbers
14/3 <- The answer is 4 2/3.
# choices
B <- The correct option is (B). ;; The answer is (B). ;; The answer is B. ;; Answer: B
B <- **Answer: B** ;; The correct answer is **B) 12**.
C <- So the answer is option C.
# without a box
36\pi <- The volume is 36π cm^3.
5/3 <- Hence $x=\frac{5}{3}$.
6\sqrt{2} <- Therefore the area is $6\sqrt{2}$ square units.
25 <- The area is 25 m². ;; The speed is 25 m/s.
17 <- So she has 17 apples left. ;; So **17** ;; The answer is: **17** ;; Final answer: $17$.
17 <- **Final Answer**: The final answer is $17$. I hope it is correct.
x^2-4x+4 <- The polynomial is $x^2 - 4x + 4$.
\{1,2\} <- Thus, the solution set is $\{1, 2\}$.
[0,5) <- The interval is $[0, 5)$.
(3,-2) <- Hence, the point is (3, -2).
7 <- \[ x = 7 \]
1/3 <- $$\frac{1}{3}$$
1234 <- #### 1,234
12.5 <- #### $12.50 ;; #### 12.50 dollars ;; So the total cost is $12.50.
12 <- The total is 3 * 4 = 12. ;; 3 * 4 = <<3*4=12>>12 apples.¶#### 12
12 <- The perimeter equals 12 cm
-3, 3 <- x = -3 or x = 3
32 <- Therefore x is 2^5.
42 <- ANSWER: 42 ;; answer = 42 ;; The answer should be 42. ;; Answer is 42 ;; My answer: 42.
42 <- The answer would be 42 (see above). ;; <answer>42</answer>
42 <- The result is 42, which is even. ;; Answer: 42 (since 6*7 = 42) ;; The answer is  `42`
42 <- The answer is "42". ;; The final answer is:¶¶$$42$$ ;; The final answer is¶42
42 <- Thus the number is $\mathbf{42}$.
1/2 <- <answer> $\frac{1}{2}$ </answer>
Tuesday <- The answer is $\text{Tuesday}$.
5/12 <- The probability is $\frac{5}{12}$.
5 <- So the answer is $5$ cm. ;; The value of x is 5.
3x+2 <- Hence $y = 3x + 2$.
-5 <- So the final answer is -5.
120 <- So there are 120 ways.
10% <- The answer is 10%.
10:30 am <- It is 10:30 am.
3:4 <- Answer: 3:4
5000 <- The answer is 5,000.
-1/2 <- The answer is $-\frac{1}{2}$
# other boxes and wrappers
x+1 <- \framebox{x+1}
42 <- \fbox{ 42 } ;; \boxed  {42} ;; \boxed 42 ;; \boxed{\boxed{42}} ;; \fbox{\boxed{42}}
42 <- \colorbox{yellow}{42} ;; \boxed{x = \boxed{42}} ;; \boxed{\,}. \boxed{42}
42 <- \boxed{42}. Put into \boxed{ }. ;; $\boxed{42}$ \\(\\checkmark\\) ;; \tcboxmath{42}
42 <- \\boxed{42}
7 <- $\boxed 7$
# unboxed, many wordings
5 <- Therefore, $x = 5$. ;; So the value of $x$ is $5$. ;; Thus, the answer is $\mathbf{5}$.
5 <- Final Answer: The final answer is $5$ ;; **Final Answer:** $x = 5$
5 <- The final answer is: $5$. ;; Hence the required number is 5. ;; We conclude that x equals 5.
5 <- ANSWER: $5$ ;; Answer:¶¶5 ;; Answer:¶$$x=5$$ ;; So, **x = 5**. ;; ### Answer¶5
5 <- ## Answer: 5 ;; *Answer*: 5 ;; The correct answer is: 5 ;; The answer, then, is 5.
5 <- Our answer is 5. ;; Answer = 5 ;; #### 5 ;; ####5 ;; #### $5 ;; #### 5 apples ;; #### **5**
5 <- The result is $5$. ;; $\therefore x = 5$ ;; ∴ x = 5 ;; x=5 ✓
5 <- Therefore, there are 5 apples in the basket. ;; \[¶x = 5¶\] ;; \[x=5.\] ;; $$¶x = 5¶$$
5 <- \begin{align*}¶x &= 15/3 \\¶&= 5¶\end{align*} ;; So x=5 ;; That is 5. ;; It takes 5 hours.
5 <- So they need 5 more days. ;; Hence, she earns $5 per hour. ;; So the total is \$5.
5 <- The total cost is $5.00. ;; Total = 2 + 3 = 5 apples ;; The answer is 5 because 3*5+4=19.
5 <- The answer is 5, since 3*5+4=19. ;; The answer is $5$, as required.
5 <- The answer is 5 (five). ;; So the final result: 5 ;; <answer>5</answer>
5 <- <answer>\boxed{5}</answer> ;; <answer>¶$5$¶</answer> ;; <answer> x = 5 </answer>
5 <- The solution is $x = 5$.
1,5 <- The solutions are $x=1$ and $x=5$. ;; The roots are 1 and 5. ;; Thus x = 1 or x = 5.
\{1,5\} <- The solution set is {1, 5}.
(1,5) <- The point is $(1, 5)$. ;; The coordinates are (1, 5).
[1,5) <- So the range is $[1, 5)$. ;; Therefore $1 \le x < 5$.
\frac{25\sqrt3}{4} <- The area is $\frac{25\sqrt{3}}{4}$ square units.
5/2 <- The answer is $\frac{5}{2}$ meters. ;; The answer is 2.5 meters ;; The answer is 2 1/2.
5/2 <- The answer is $2\frac{1}{2}$.
2.5 <- The answer is 5/2.
2:5 <- The ratio is 2:5.
25 <- The answer is 25%.
1/4 <- The probability is 25\%.
50 <- The answer is $50^\circ$. ;; The angle is 50 degrees. ;; The angle measures 50°.
1011_2 <- The number is $1011_2$. ;; In base 2 it is $1011_2$.
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- The matrix is $\begin{pmatrix}1&2\\3&4\end{pmatrix}$.
(x+1)^2 <- The polynomial is $x^2+2x+1$.
(x+2)(x+1) <- The factored form is $(x+1)(x+2)$.
y=2x+1 <- The equation is $y = 2x + 1$. ;; The equation of the line is y = 2x + 1.
3+4i <- The answer is $3 + 4i$. ;; The answer is 3 + 4i.
C <- The answer is (C). ;; The answer is C) 12. ;; Therefore, the correct choice is (C).
C <- Option C is correct. ;; **C** ;; (C) ;; Answer: (C) 12 ;; The answer is \textbf{(C)}.
C <- The answer is $\textbf{(C)}\ 12$.
ellipse <- The answer is an ellipse.
yes <- The answer is "yes".
no <- Answer: No
Monday <- The answer is Monday.
Wednesday <- So the day is **Wednesday**.
-0.5 <- The answer is $-\frac{1}{2}$.
-5 <- The answer is -5. ;; The answer is −5. ;; The answer is negative 5.
1234 <- The answer is 1,234. ;; The answer is $1{,}234$.
1024 <- The answer is $2^{10}$.
3\sqrt2 <- The answer is 3√2. ;; The answer is 3 sqrt(2). ;; The answer is $3\sqrt{2}$ cm.
3\sqrt2 <- The distance is $3\sqrt{2}$ units.
\frac{\pi}{4} <- The answer is π/4.
(-\infty,3) <- The answer is $x \in (-\infty, 3)$. ;; The answer is $x<3$.
10:30 am <- The time is 10:30 a.m.
10:30 pm <- It arrives at 10:30 p.m.
May 3 <- The date is May 3.
1/3 <- The answer is 0.333.... ;; The answer is $0.\overline{3}$.
3\pmod 7 <- The answer is 3 (mod 7).
\ln 2 <- The answer is $\ln 2$.
3 <- The remainder is 3.
120 <- The answer is 5!.
0.001 <- The answer is 10^-3.
1500 <- The answer is 1.5e3. ;; The answer is 1.5 × 10^3. ;; The answer is $1.5 \times 10^{3}$.
# other boxes & text around
5 <- $\boxed{5}$.¶¶Let me double check: 3*5+4 = 19. Yes.
5 <- The answer is $\boxed{5}$. The sum of 2 and 3 is 5, and 7 is prime. ;; **\(\boxed{5}\)**
5 <- \[\boxed{x=5}\] ;; \boxed{5}\% ;; \boxed{5}^\circ ;; \boxed{5} cm
C <- $$\boxed{\text{(C)}}$$
50% <- \boxed{50}\%
# more notations
5 <- So we get 5.¶¶**Verification**: it holds. ;; So the total is **5**.
5 <- Answer: 5¶¶**Note:** it is prime. ;; The total is 5 dollars for each of them.
5 <- $\boxed{5}\quad\square$ ;; \boxed{5}\tag{1} ;; \boxed{5.}.
7 <- Therefore $m+n = 3+4 = 7$.
36 <- $\angle FAJ = 180^\circ - \angle AFJ - 72^\circ = 36^\circ.$
9/256 <- So the area is $\frac{3}{4} \left( \frac{\sqrt{3}}{8} \right)^2 = \frac{9}{256}.$
3\sqrt{13} <- $\sqrt{117} = 3\sqrt{13}$
3\sqrt{13} <- \begin{align*}d &= \sqrt{36+81}\\ &= \sqrt{117} = 3\sqrt{13}.\end{align*}
180 <- Thus $(a,b,c)=(3,5,12)\Longrightarrow abc=180$.
14 <- \[x = 7 \implies 2x = 14\]
26 <- \[a_4=14\] \[a_5=26\]
16 <- So the answer to the problem is just $16$.
748 <- Thus $k=748$ is the smallest possible value of $k$.
2\sqrt5 <- Hence $2c = 2\sqrt{5}.$
331 <- Therefore $f(1) + f(2) + \dots + f(1985) = 331.$
(3,4] <- The set is $\lambda \in (3,4].$
17 <- So $36 - 7 - 2 - 10 = 17 = x$.
\begin{pmatrix}-2\\-14\end{pmatrix} <- \[\mathbf{A} v = \begin{pmatrix} -2 \\ -14 \end{pmatrix}.\]
9 <- $\equiv 9 \pmod{11}$
# other languages and forms of a statement
36 <- 答案是 $36$。 ;; 答案：36 ;; 所以答案是36。
36 <- 答え：36 ;; Réponse : 36 ;; Ответ: $36$. ;; Answer：36
36 <- Answer -> 36 ;; Final Answer - 36 ;; **Answer** — $36$ ;; $$\text{Answer: } 36$$
36 <- [Answer] 36
36 <- Answer:¶```¶36¶``` ;; The answer is: <b>36</b> ;; Answer: 36<|eot_id|>
36 <- The answer is $36$.</s>
40\text{ feet} <- So it is 40\text{ feet}.
gray <- The answer is: \text{The answer is gray.} ;; $\text{The answer is } \text{gray}$
36 <- **\text{Answer: } 36** ;; \[\text{The final answer is } 36\]
\begin{pmatrix}2\\-1\end{pmatrix} <- Answer: \begin{pmatrix}¶2 \\¶-1¶\end{pmatrix}
# remarks after the answer, and what the question gave
16 <- Hence it is $16$. Note that equality holds when $(a,b)=(1,3)$.
16 <- It is $16$.¶[asy]¶dot((0,7));¶[/asy] ;; So $k-1 = 15$, and $k = 16$.
16 <- There are $16$ divisors of 196. ;; There are $16$ values of $B$. ;; It is $16$ when $x > 9$.
16 <- Therefore, $16$ is the first term that is greater than 125. ;; There are 16 of the 36 left.
16 <- It is $16$. (One gear turns exactly 20 times.)
3/4 <- The probability is 3 out of 4.
"""
WRONG_TEXTS = r"""
540 <- So, Sunny earned $150 + $390 = $550 for two days.
2 <- So he makes 60*2=$120 in 2 weeks
7 <- So it is = 7^3 in 2 weeks. ;; So n = 7 million in 2 weeks. ;; So it is 3 + 4 = 7 or 8 of them.
5 <- So on Tuesday 4 inches + 1 = 6 inches ;; So it is 4 < 5
2/3 <- The answer is 4 2/3.
3 <- The answer is 4 2/3. ;; The volume is 36π cm^3. ;; Hence $x=\frac{5}{3}$. ;; x = -3 or x = 3
3 <- Answer: 3:4 ;; The answer is 1.5e3 ;; Answer: 7 cm^3 ;; $3!$ ;; Therefore, $x = 5$.
E <- The answer is A, not E.
36 <- The volume is 36π cm^3. ;; So $36 - 7 - 2 - 10 = 17 = x$.
5 <- Hence $x=\frac{5}{3}$. ;; The interval is $[0, 5)$. ;; Therefore x is 2^5.
5 <- The answer is 5/8. ;; Therefore, $x = -5$. ;; The answer is $5x$. ;; The answer is 5 or 6.
5 <- The answer is not 5. ;; I don't know. ;; The answer is $\frac{5}{2}$.
5 <- The answer is $(1, 5)$. ;; The answer is (1, 5). ;; The ratio is 2:5.
5 <- The answer is $x < 5$. ;; The answer is $2^5$. ;; The answer is $x_5$.
5 <- The answer is $\sqrt{5}$. ;; The answer is √5. ;; The answer is sqrt(5).
5 <- The answer is $\log_2 5$. ;; The answer is 2 1/5. ;; The answer is 5 million.
5 <- The answer is 5π. ;; The answer is 5 pi. ;; The answer is 5i. ;; The answer is 3+5i.
5 <- The answer is $1011_5$. ;; The answer is 10:05 am. ;; The answer is May 5.
5 <- The answer is 0.5. ;; The answer is .5 ;; The answer is 15. ;; The answer is 5,000.
5 <- The answer is 5 - x. ;; The answer is |5|x. ;; <answer>6</answer> ;; <answer>5 or 6</answer>
5 <- \boxed{5}? No. \boxed{6} ;; \boxed{5}¶¶Wait, that is wrong. \boxed{6} ;; \boxed{6}; \boxed{5}
5 <- The answer is 5 (or 6). ;; The answer is 5 for odd n and 6 for even n.
5 <- The answer is 5 to 6. ;; The answer is 5-6. ;; The answer is 5 squared.
5 <- The answer is 5 times 6. ;; either 5 or 6
6 <- The area is $6\sqrt{2}$. ;; The answer is either 5 or 6. ;; The answer could be 5 or 6.
6 <- The answer is 5, or possibly 6. ;; The answer is between 5 and 6.
6 <- The answer is at least 5. ;; It is 5 or 6
2 <- The area is $6\sqrt{2}$. ;; The point is (3, -2). ;; the answer is 2x
2 <- The answer is $\frac{5}{2}$. ;; The answer is 5/2. ;; The answer is $2\frac{1}{5}$.
4 <- The polynomial is $x^2 - 4x + 4$. ;; Answer: 3:4
-2 <- The point is (3, -2).
13 <- So it takes 3 days for 12 men.
8 <- The answer is 5/8. ;; Therefore $m+n = 3+4 = 8$.
30 <- It is 10:30 am.
120x <- The answer is 5!
11 <- The answer is 10%.
42 <- The answer is not 42. ;; The answer is 42 or 43. ;; Is it 42? I guess 43.
42 <- between 41 and 42 ;; The answer is 41 < x < 42 ;; The answer is $x > 42$ ;; n = 42k
42 <- \boxed{41}, not \boxed{} ;; \fbox{42} \fbox{41} ;; \boxed{42} is wrong; it is \boxed{41}
42 <- \boxed{4}2
43 <- It is at least 42 ;; \boxed{}42
x+2 <- \fbox{x+1}
1 <- \boxed 17
19 <- Therefore, $x = 5$.
(1,5) <- The answer is $[1,5)$.
5:2 <- The ratio is 2:5.
500 <- The answer is 5%.
5x <- The answer is $5^\circ$.
A <- The answer is C. ;; Option C is correct.
C <- Answer: A or C ;; **A**
Monday <- The answer is Tuesday.
no <- The answer is yes or no.
six apples <- The answer is 5
B <- Option A is correct. Option B is correct too.
7 <- \[x = 7 \implies 2x = 14\]
14 <- \[a_4=14\] \[a_5=26\]
749 <- Thus $k=748$ is the smallest possible value of $k$.
3\sqrt{14} <- $\sqrt{117} = 3\sqrt{14}$
36 <- I first thought the answer is $36$, but that counts twice. So it is $37$. ;; 36 (or maybe 37).
36 <- The answer is 36? Or 37? ;; The answer is 37. (Its sum with -1 is 36.) ;; 答案：37
36 <- Answer -> -36
36 <- The answer cannot be 36. ;; I do not know whether it is 36 or not ;; So it is more than 36
36 <- The answer is 36... no, 37. ;; A common wrong answer is 36. It is $37$.
36 <- There are 16 of the 36 left. ;; Answer: 37<|eot_id|> ;; There are $16$ divisors of 36.
15 <- So $k-1 = 15$, and $k = 16$.
"""


@pytest.mark.parametrize(("answer", "gold"), cases(RIGHT))
def test_notation_of_the_gold_is_right(answer: str, gold: str) -> None:
    assert decision(f"\\boxed{{{answer}}}", gold) is True


@pytest.mark.parametrize(("answer", "gold"), cases(WRONG))
def test_twin_of_a_notation_is_wrong(answer: str, gold: str) -> None:
    assert decision(f"\\boxed{{{answer}}}", gold) is False


@pytest.mark.parametrize(("text", "gold"), cases(RIGHT_TEXTS))
def test_stated_answer_is_found(text: str, gold: str) -> None:
    assert decision(WORK + text, gold) is True


@pytest.mark.parametrize(("text", "gold"), cases(WRONG_TEXTS))
def test_stated_answer_counts_as_a_whole(text: str, gold: str) -> None:
    assert decision(WORK + text, gold) is False


PIECES = (
    r"x 5 % ( ) [ ] { } \{ \} , ; : = < \le \ne \pm \cup \frac ^ _ ! | \sqrt \circ \text{cm} "
    r"and or \infty - \pmod 0.\overline{3} ... \log i \begin{pmatrix} \end{pmatrix} & \\ am May C "
    r"\setminus \mathbb{R} \in \approx ' ½ ° 1/0 \binom \equiv ** base"
).split()


def test_no_pair_of_answers_raises() -> None:
    """An exception would end the reward worker."""
    rng = random.Random(0)
    pool = [text for table in (RIGHT, WRONG) for pair in cases(table) for text in pair]
    for _ in range(1500):
        gold, answer = rng.choice(pool), rng.choice(pool)
        place = rng.randrange(len(answer) + 1)
        broken = answer[:place] + " ".join(rng.choices(PIECES, k=rng.randrange(4))) + answer[place:]
        for one in (answer, broken):
            assert decision(f"\\boxed{{{one}}}", gold) in (True, False, None)
            assert decision(f"The answer is {one}", gold) in (True, False, None)
